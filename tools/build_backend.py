"""PEP 517 and 660 build backend: setuptools, plus PyTorch's headers when there is an nvcc to use them.

pip builds in isolation, where torch would have to be downloaded again. It is asked for only if nvcc exists and the
environment that pip runs in has no torch of its own, so a build without CUDA downloads nothing but setuptools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import build_kernels
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()


def _torch() -> list[str]:
    return ["torch>=2.10"] if build_kernels.needs_torch() else []
