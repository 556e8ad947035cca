"""Compiles csrc/ with nvcc into halo_train/_kernels.so and records the outcome in halo_train/_kernels.json.

Needs nvcc and PyTorch's headers, no GPU, and does not import torch: the kernels use PyTorch's stable ABI, so one library
serves every PyTorch from 2.10 on, CPU builds of it included at compile time. ``setup.py`` calls this for wheels and editable
installs; during development run ``python tools/build_kernels.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
LIBRARY = "_kernels.so"
RECORD = "_kernels.json"

ARCHS_VARIABLE = "HALO_TRAIN_CUDA_ARCHS"
DEFAULT_ARCHS = ("80", "89", "90a", "100", "120")
"""Machine code for these, of which nvcc must know; PTX of the newest serves what comes after."""

MIN_TORCH = (2, 10)
TARGET_VERSION = "0x020a000000000000"
"""TORCH_TARGET_VERSION of 2.10: newer parts of the stable ABI are hidden, so that the library loads there."""


@dataclass(frozen=True)
class Plan:
    """What to build, decided before anything is compiled. ``reason`` says why nothing is, else it is empty."""

    reason: str = ""
    nvcc: Path | None = None
    nvcc_version: str = ""
    torch_include: Path | None = None
    torch_version: str = ""
    archs: tuple[str, ...] = ()

    @property
    def enabled(self) -> bool:
        return not self.reason


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def site_directories() -> list[Path]:
    """Where packages of this interpreter lie, its environment's own included when pip's build isolation hides them.

    A .pth file in one of them that names a directory is followed; virtual environments that see another one's packages
    use this.
    """
    paths = sysconfig.get_paths()
    names = [
        *sys.path,
        paths["purelib"],
        paths["platlib"],
        *site.getsitepackages(),
        site.getusersitepackages(),
    ]
    found: dict[Path, None] = {}
    for name in names:
        directory = Path(name)
        if not name or not directory.is_dir():
            continue
        found[directory] = None
        for file in sorted(directory.glob("*.pth")):
            for line in file.read_text(errors="replace").splitlines():
                target = directory / line.strip()
                if line.strip() and not line.startswith(("#", "import ", "import\t")) and target.is_dir():
                    found[target] = None
    return list(found)


def find_torch_include() -> Path | None:
    """PyTorch's include directory with the stable ABI, found by path."""
    for directory in site_directories():
        include = directory / "torch" / "include"
        if (include / "torch" / "csrc" / "stable" / "library.h").is_file():
            return include
    return None


def torch_version(include: Path) -> str:
    """Version of the headers, e.g. ``2.13.0``."""
    text = (include / "torch" / "headeronly" / "version.h").read_text()
    parts = [re.search(rf"#define TORCH_VERSION_{name} (\d+)", text) for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match.group(1) for match in parts if match)


def make_plan(archs: Sequence[str] | None = None, torch_include: Path | None = None) -> Plan:
    """Looks for what a build needs.

    Args:
        archs: compute capabilities such as "90a", or "all" for the default list; None takes HALO_TRAIN_CUDA_ARCHS, or what
            the GPUs of this machine run, or without GPUs "all". What this nvcc does not know is left out of the list.
        torch_include: PyTorch's include directory; None looks for it.
    """
    if archs is None and os.environ.get(ARCHS_VARIABLE):
        archs = re.split(r"[,;\s]+", os.environ[ARCHS_VARIABLE].strip())
    if archs is not None and [arch.lower() for arch in archs] == ["none"]:
        return Plan(reason=f"{ARCHS_VARIABLE}=none asked for an installation without them")
    nvcc = find_nvcc()
    if nvcc is None:
        return Plan(reason="nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda/bin)")
    include = torch_include or find_torch_include()
    if include is None:
        return Plan(
            reason="PyTorch's headers were not found (torch/include/torch/csrc/stable in site-packages)"
        )
    version = torch_version(include)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        return Plan(reason=f"PyTorch {version} is too old: its headers must be 2.10 or newer")
    release = re.search(r"V([\d.]+)", _output([nvcc, "--version"]))
    if archs is None or [arch.lower() for arch in archs] == ["all"]:
        known = set(re.findall(r"compute_(\w+)", _output([nvcc, "--list-gpu-arch"])))
        wanted = DEFAULT_ARCHS if archs else archs_of_this_machine() or DEFAULT_ARCHS
        archs = [arch for arch in wanted if arch.rstrip("af") in known]
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if bad or not archs:
        raise ValueError(
            f"{ARCHS_VARIABLE} (--archs): must be 'none', 'all' or compute capabilities such as '80,90a'; got {', '.join(archs)!r}"
        )
    return Plan("", nvcc, release.group(1) if release else "", include, version, tuple(archs))


def archs_of_this_machine() -> tuple[str, ...]:
    """Of the default list, what the GPUs of this machine run; empty where there are none. Five take five times as long."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return ()
    query = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    capabilities = {
        (int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)\s*$", found, re.M)
    }
    # A GPU runs code for its own major version up to its minor one.
    fits = [
        max(
            (a for a in DEFAULT_ARCHS if _capability(a)[0] == major and _capability(a)[1] <= minor),
            key=_capability,
            default="",
        )
        for major, minor in capabilities
    ]
    return tuple(arch for arch in DEFAULT_ARCHS if arch in fits)


def _capability(arch: str) -> tuple[int, int]:
    number = int(arch.rstrip("af"))
    return number // 10, number % 10


def needs_torch() -> bool:
    """Whether a build would use PyTorch's headers but finds none."""
    asked_not = os.environ.get(ARCHS_VARIABLE, "").strip().lower() == "none"
    return not asked_not and find_nvcc() is not None and find_torch_include() is None


def build(plan: Plan, package: Path) -> Path | None:
    """Writes the library, if the plan has one, and the record into the directory ``package``; returns the library.

    Raises:
        RuntimeError: nvcc failed; the message holds its command and output.
    """
    package.mkdir(parents=True, exist_ok=True)
    library = package / LIBRARY
    # A library of an earlier build must not outlive the record that it is not built.
    library.unlink(missing_ok=True)
    if plan.enabled:
        shutil.copyfile(_link(plan, _compile(plan)), library)
    record = {
        "built": plan.enabled,
        "reason": plan.reason,
        "nvcc": plan.nvcc_version,
        "torch_headers": plan.torch_version,
        "architectures": _architectures(plan.archs),
    }
    (package / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(f"halo_train: {describe(plan)}", file=sys.stderr, flush=True)
    return library if plan.enabled else None


def describe(plan: Plan) -> str:
    """One line on what was built, or why nothing was."""
    if not plan.enabled:
        return f"CUDA kernels not built: {plan.reason}. GPU tensors will raise an error; the CPU path works"
    return (
        f"CUDA kernels built for {', '.join(_architectures(plan.archs))} with nvcc {plan.nvcc_version} and the headers "
        f"of PyTorch {plan.torch_version}"
    )


def _architectures(archs: Sequence[str]) -> list[str]:
    return [f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in _ptx(archs)]


def _ptx(archs: Sequence[str]) -> list[str]:
    # "90a" is for that GPU alone, so only plain capabilities have PTX that later ones can use.
    plain = [arch for arch in archs if arch.isdigit()]
    return [max(plain, key=int)] if plain else []


def _flags(plan: Plan, source: Path) -> list[str]:
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden"]
    if source.suffix == ".cu":
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in plan.archs]
        flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in _ptx(plan.archs)]
        return flags
    names = ", ".join(_architectures(plan.archs))
    # USE_CUDA declares aoti_torch_get_current_cuda_stream.
    return [*flags, f"-I{plan.torch_include}", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
            f'-DHALO_TRAIN_ARCHS="{names}"']  # fmt: skip


def _compile(plan: Plan) -> list[Path]:
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])

    def compile_one(source: Path) -> Path:
        flags = _flags(plan, source)
        key = hashlib.sha256(b"".join(path.read_bytes() for path in _with_includes(source)))
        key.update(" ".join([*flags, str(plan.nvcc), plan.nvcc_version, plan.torch_version]).encode())
        target = _build_directory() / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.partial.o")
            _run([plan.nvcc, *flags, "-c", source, "-o", partial])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def _with_includes(source: Path) -> list[Path]:
    """The file and every header of csrc/ that it includes, directly or not."""
    found = [source]
    for path in found:
        names = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        found += [path.parent / name for name in names if path.parent / name not in found]
    return found


def _link(plan: Plan, objects: list[Path]) -> Path:
    # CPU builds of PyTorch have no libtorch_cuda.so to link with, and the linked library must not depend on which build
    # was found. An empty library of that name makes it a needed library all the same; the real one is loaded at run time.
    directory = _build_directory()
    stub = directory / "libtorch_cuda.so"
    if not stub.exists():
        empty = directory / "empty.cpp"
        empty.write_text("")
        _run([plan.nvcc, "-shared", "-cudart=none", "-Xlinker=-soname=libtorch_cuda.so", empty, "-o", stub])
    key = hashlib.sha256(" ".join(str(path) for path in objects).encode()).hexdigest()[:16]
    library = directory / f"kernels-{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.partial.so")
        _run([plan.nvcc, "-shared", "-cudart=static", *objects, "-Xlinker=--no-as-needed", f"-L{directory}",
              "-ltorch_cuda", "-o", partial])  # fmt: skip
        partial.replace(library)
    return library


def _build_directory() -> Path:
    directory = ROOT / "build" / "kernels"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _run(command: Sequence[object]) -> None:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"the CUDA kernels did not compile.\n{' '.join(words)}\n{result.stdout}{result.stderr}\n"
            f"Set {ARCHS_VARIABLE}=none to install without them"
        )


def _output(command: Sequence[object]) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile csrc/ into halo_train/_kernels.so.")
    parser.add_argument(
        "--archs",
        help=f"e.g. 90a,80, none, or all: {','.join(DEFAULT_ARCHS)}; default {ARCHS_VARIABLE}, or those of the GPUs here, or all",
    )
    parser.add_argument(
        "--torch-include", type=Path, help="PyTorch's include directory; default: look for it"
    )
    arguments = parser.parse_args()
    archs = arguments.archs.split(",") if arguments.archs else None
    try:
        build(make_plan(archs, arguments.torch_include), ROOT / "halo_train")
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
