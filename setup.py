"""The parts of the build that pyproject.toml cannot say: the CUDA kernels and the wheel's tag that follows from them."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import build_kernels  # noqa: E402

PLAN = build_kernels.make_plan()
PACKAGE = "halo_train"


class BuildPackage(build_py):
    """Python files; without kernels also the record that says why."""

    def run(self) -> None:
        super().run()
        if not PLAN.enabled:
            build_kernels.build(PLAN, (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE)


class BuildKernels(build_ext):
    """The library and its record, in the source tree for editable installs. It is no Python extension: no ABI suffix."""

    def run(self) -> None:
        if self.extensions:
            build_kernels.build(PLAN, (ROOT if self.inplace else Path(self.build_lib)) / PACKAGE)

    def get_outputs(self) -> list[str]:
        if self.inplace or not self.extensions:
            return []
        return [
            str(Path(self.build_lib) / PACKAGE / name)
            for name in (build_kernels.LIBRARY, build_kernels.RECORD)
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """py3-none-<platform> with kernels, for they know no Python ABI; py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    ext_modules=[Extension(f"{PACKAGE}._kernels", sources=[])] if PLAN.enabled else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)
