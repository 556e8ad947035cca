"""tools/build_kernels.py: what it finds, what it records, and that the library it links is one PyTorch can load."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The build script, with its intermediate files elsewhere and no setting from the caller's environment."""
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "tools" / "build_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_kernels", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_build_directory", lambda: tmp_path)
    for name in ("HALO_TRAIN_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return module


def fake_nvcc(directory: Path) -> Path:
    path = directory / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release 12.6, V12.6.20';;\n"
        "--list-gpu-arch) printf 'compute_80\\ncompute_89\\ncompute_90\\n';;\n*) echo 'no such file' >&2; exit 2;;\nesac\n"
    )
    path.chmod(0o755)
    return path


def fake_headers(directory: Path, version: str = "2.13.0") -> Path:
    include = directory / "torch" / "include"
    (include / "torch" / "csrc" / "stable").mkdir(parents=True)
    (include / "torch" / "headeronly").mkdir()
    (include / "torch" / "csrc" / "stable" / "library.h").touch()
    lines = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "torch" / "headeronly" / "version.h").write_text(
        "".join(f"#define TORCH_VERSION_{name} {value}\n" for name, value in lines)
    )
    return include


def test_finds_nvcc_in_cuda_home(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert kernels.find_nvcc() == nvcc


def test_default_architectures_are_those_nvcc_knows(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    plan = kernels.make_plan(torch_include=fake_headers(tmp_path))
    assert plan.enabled
    assert plan.archs == ("80", "89", "90a")
    assert plan.nvcc_version == "12.6.20"
    assert plan.torch_version == "2.13.0"
    # 90a runs on that GPU only, so the PTX is of the newest plain architecture.
    assert kernels._architectures(plan.archs) == ["sm_80", "sm_89", "sm_90a", "compute_89"]


def test_a_machine_with_gpus_builds_for_these(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    include = fake_headers(tmp_path)
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for printed, archs in {
        "9.0\n9.0": ("90a",),
        "8.6\n8.9": ("80", "89"),
        "7.5": ("80", "89", "90a"),  # none of ours: as without a GPU
        "NVIDIA-SMI has failed": ("80", "89", "90a"),
    }.items():
        smi.write_text(f"#!/bin/sh\nprintf '{printed}\\n'\n")
        smi.chmod(0o755)
        assert kernels.make_plan(torch_include=include).archs == archs
    smi.write_text("#!/bin/sh\necho 9.0\n")
    assert kernels.make_plan(["all"], include).archs == ("80", "89", "90a")
    monkeypatch.setenv("HALO_TRAIN_CUDA_ARCHS", "120")
    assert kernels.make_plan(torch_include=include).archs == ("120",)


def test_without_nvcc_nothing_is_built_and_the_record_says_so(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "find_nvcc", lambda: None)
    package = tmp_path / "halo_train"
    package.mkdir()
    (package / "_kernels.so").write_text("of an earlier build")
    plan = kernels.make_plan()
    assert kernels.build(plan, package) is None
    record = json.loads((package / "_kernels.json").read_text())
    assert record["built"] is False
    assert "nvcc was not found" in record["reason"]
    assert not (package / "_kernels.so").exists()
    assert not kernels.needs_torch()


def test_environment_variable_turns_the_build_off(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("HALO_TRAIN_CUDA_ARCHS", "none")
    plan = kernels.make_plan()
    assert not plan.enabled
    assert "HALO_TRAIN_CUDA_ARCHS=none" in plan.reason
    assert not kernels.needs_torch()


def test_environment_variable_chooses_architectures(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    include = fake_headers(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("HALO_TRAIN_CUDA_ARCHS", "90a, 120")
    assert kernels.make_plan(torch_include=include).archs == ("90a", "120")
    monkeypatch.setenv("HALO_TRAIN_CUDA_ARCHS", "hopper")
    with pytest.raises(ValueError, match="compute capabilities such as '80,90a'; got 'hopper'"):
        kernels.make_plan(torch_include=include)


def test_old_or_missing_headers_are_a_reason(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "2.9.1 is too old" in kernels.make_plan(torch_include=fake_headers(tmp_path, "2.9.1")).reason
    monkeypatch.setattr(kernels, "site_directories", lambda: [])
    assert "headers were not found" in kernels.make_plan().reason
    assert kernels.needs_torch()


def test_headers_of_a_parent_environment_are_found_through_a_pth_file(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pip's build isolation hides site-packages from sys.path, and a .venv may see torch only through a .pth file."""
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    include = fake_headers(outer)
    inner.mkdir()
    (inner / "parent.pth").write_text(f"# comment\nimport os\n{outer}\n/does/not/exist\n")
    monkeypatch.setattr(
        kernels.sysconfig, "get_paths", lambda: {"purelib": str(inner), "platlib": str(inner)}
    )
    monkeypatch.setattr(kernels.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(kernels.site, "getusersitepackages", lambda: str(tmp_path / "none"))
    monkeypatch.setattr(sys, "path", [])
    assert kernels.find_torch_include() == include


def test_a_failing_compiler_is_an_error_with_its_output(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    plan = kernels.make_plan(torch_include=fake_headers(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"did not compile(.|\n)*no such file(.|\n)*HALO_TRAIN_CUDA_ARCHS=none"
    ):
        kernels.build(plan, tmp_path / "halo_train")


@pytest.mark.slow
def test_library_registers_with_pytorch(kernels: ModuleType, tmp_path: Path) -> None:
    if kernels.find_nvcc() is None:
        pytest.skip("needs nvcc")
    if kernels.find_torch_include() is None:
        pytest.skip("needs PyTorch's headers")
    library = kernels.build(kernels.make_plan(["90a"]), tmp_path / "halo_train")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed, "a shared CUDA runtime would tie the library to one CUDA version"
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in symbols.splitlines() if " U " in line}
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= undefined
    assert not [name for name in undefined if "c10" in name and not name.startswith("torch_c10")], (
        "only the stable ABI"
    )
    # The real libtorch_cuda.so brings libtorch_cpu.so with it. The stub does not, so that is loaded first; then all but
    # the CUDA functions, which are resolved when they are called, is there and the registration runs.
    script = (
        "import ctypes, os, pathlib, sys, torch\n"
        "lib = pathlib.Path(torch.__file__).with_name('lib') / 'libtorch_cpu.so'\n"
        "ctypes.CDLL(str(lib), mode=ctypes.RTLD_GLOBAL)\n"
        "ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)\n"
        "library = torch.library.Library('halo_train', 'FRAGMENT')\n"
        "library.define('hadamard(Tensor x, int block, float scale, Tensor? signs) -> Tensor')\n"
        "ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('halo_train::hadamard', 'CUDA'))\n"
    )
    stub = tmp_path / "libtorch_cuda.so"
    result = subprocess.run(
        [sys.executable, "-c", script, str(library), str(stub)], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.slow
def test_wheel_without_kernels(tmp_path: Path) -> None:
    """The whole packaging path: sdist contents and a pure wheel with the reason inside."""
    environment = {**os.environ, "HALO_TRAIN_CUDA_ARCHS": "none"}
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).symlink_to(os.readlink(ROOT / name))
            else:
                (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(source)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if built.returncode and "setuptools" in built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("needs a package index for setuptools")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    )
    assert "halo_train/_kernels.json" in listing.stdout
    assert "_kernels.so" not in listing.stdout
