"""Makes .venv for the Makefile: a virtual environment with the package, editable, and the extras that are asked for.

A torch (>= 2.10) that the running interpreter can already import is kept: the new environment sees it through a .pth
file. Otherwise torch comes at the version pinned in constraints.txt.

    python3 tools/make_venv.py .venv train,dev
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 10)


def torch_of(python: str) -> tuple[str, Path] | None:
    """Version and site-packages folder of the torch that an interpreter imports, when it is new enough."""
    probe = (
        "import torch, pathlib; print(torch.__version__); print(pathlib.Path(torch.__file__).parent.parent)"
    )
    result = subprocess.run([python, "-c", probe], capture_output=True, text=True, cwd="/")
    if result.returncode:
        return None
    version, site = result.stdout.split()
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        print(f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}: installing another")
        return None
    return version, Path(site)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU to run kernels on."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def main() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        sys.exit(
            f"halo_train needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}: PYTHON=python3.12 make"
        )
    venv, extras = Path(sys.argv[1]).resolve(), sys.argv[2]
    python = venv / "bin" / "python"
    if not python.exists() and subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
        # No ensurepip (Debian without python3-venv): the pip of this interpreter installs into the environment.
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)], check=True)
    with_pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    runner = (
        [str(python), "-m", "pip"] if with_pip else [sys.executable, "-m", "pip", "--python", str(python)]
    )
    pip = [*runner, "--disable-pip-version-check", "install", "--quiet"]

    torch = torch_of(str(python)) or torch_of(sys.executable)
    constraints = []
    if torch:
        version, site = torch
        print(f"keeping torch {version} in {site}")
        own = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        if site != own:
            (own / "existing_torch.pth").write_text(f"{site}\n")
    else:
        constraints = [f"--constraint={ROOT / 'constraints.txt'}"]
        # First, so that the kernels are compiled against the headers of the torch that will run them.
        subprocess.run([*pip, *constraints, "torch"], check=True)
    env = dict(os.environ)
    if not has_gpu():
        env.setdefault("HALO_TRAIN_CUDA_ARCHS", "none")
    subprocess.run([*pip, *constraints, "--editable", f"{ROOT}[{extras}]"], check=True, env=env)


if __name__ == "__main__":
    main()
