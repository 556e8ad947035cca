"""Registers the operators with PyTorch and says what serves each of them; the only file that names ``torch.ops.halo_train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .fakes import FAKES
from .schemas import GENERIC_OPS, SCHEMAS, TRITON_OPS

_LIBRARY_FILE = Path(__file__).parent.with_name("_kernels.so")
_BUILD_FILE = Path(__file__).parent.with_name("_kernels.json")
library = torch.library.Library("halo_train", "DEF")
overloads = SimpleNamespace()
"""The operators: looking an overload up costs the host as much as calling it."""


def kernel_status() -> dict[str, Any]:
    """What the build left behind: ``{"loaded": bool, "reason": str, "build": dict, "ops": {op: implementation}}``."""
    kernel_ops = (name for name in SCHEMAS if name not in GENERIC_OPS)
    ops = {name: "Triton kernel" if name in TRITON_OPS else "CUDA kernel" for name in kernel_ops}
    return {"loaded": not _why_not_loaded, "reason": _why_not_loaded, "build": _build_info(), "ops": ops}


def _build_info() -> dict[str, Any]:
    return json.loads(_BUILD_FILE.read_text()) if _BUILD_FILE.exists() else {}


def _load() -> str:
    """Loads the kernels; returns why that was not possible, or an empty string."""
    if not _LIBRARY_FILE.exists():
        return _build_info().get("reason", "the package was installed without building them")
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA"
    try:
        torch.ops.load_library(_LIBRARY_FILE)
    except OSError as error:
        return f"{_LIBRARY_FILE.name} could not be loaded: {error}"
    return ""


def _refuse(op: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"halo_train: '{op}' was called on a CUDA tensor, but its kernel is not available: {_why_not_loaded}. Install "
            "the CUDA toolkit (nvcc) and run `pip install --force-reinstall --no-deps halo_train`, or move the tensor to "
            "the CPU; `halo-train doctor` shows the state"
        )

    return refuse


for _name, (_schema, _reference) in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, _reference, "CompositeExplicitAutograd" if _name in GENERIC_OPS else "CPU")
    torch.library.register_fake(f"halo_train::{_name}", FAKES[_name], lib=library)
    setattr(overloads, _name, getattr(torch.ops.halo_train, _name).default)
_why_not_loaded = _load()
for _name in SCHEMAS:
    if _name in TRITON_OPS:
        library.impl(_name, TRITON_OPS[_name], "CUDA")
    elif _why_not_loaded and _name not in GENERIC_OPS:
        library.impl(_name, _refuse(_name), "CUDA")
