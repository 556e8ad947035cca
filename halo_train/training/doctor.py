"""Self-test behind ``halo-train doctor``: what this machine has, which kernels run, and whether the results are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from halo_train import RECIPES, Format, HaloConfig, HaloLinear, hadamard_transform
from halo_train.metrics import sqnr_db
from halo_train.ops import kernel_status

MIN_SQNR_DB = {Format.E4M3: 25.0, Format.E5M2: 20.0, Format.INT8: 30.0, Format.HIGH_PRECISION: 45.0}
"""Floor of a healthy product on normally distributed data, by format; a wrong transpose or scale falls below 10 dB."""

_HADAMARD_SIZES = ((5, 256), (3, 1024), (4, 7 * 64))
_HADAMARD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative error in norm: a few roundings of the dtype."""

_M, _K, _N = 192, 256, 160


@dataclass(frozen=True)
class Check:
    """One line of the self-test."""

    name: str
    device: str
    ok: bool
    detail: str


def describe_machine() -> list[tuple[str, str]]:
    """(what, value) pairs: PyTorch, CUDA, GPUs, the kernels or why there are none, and what each op runs on a GPU."""
    status = kernel_status()
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    build = status["build"]
    built = (
        f"nvcc {build.get('nvcc')}, {' '.join(build.get('architectures', []))}"
        if build.get("built")
        else "no"
    )
    lines = [
        ("PyTorch", torch.__version__),
        ("CUDA of PyTorch", torch.version.cuda or "none: this is a CPU build"),
        (
            "GPU",
            "; ".join(gpus)
            or "none that PyTorch can use: all runs on the CPU, where 8-bit arithmetic is emulated",
        ),
        ("kernels loaded", "yes" if status["loaded"] else f"no: {status['reason']}"),
        ("kernels built", built),
    ]
    for op, implementation in status["ops"].items():
        missing = implementation == "CUDA kernel" and not status["loaded"]
        lines.append(
            (f"  {op} on a GPU", "an error: its CUDA kernel is not loaded" if missing else implementation)
        )
    return lines


def self_test() -> Iterator[Check]:
    """Hadamard transform and every named recipe, on the CPU and on the GPU where there is one."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        for dtype, tolerance in _HADAMARD_TOLERANCE.items():
            name = f"hadamard_transform, {str(dtype).removeprefix('torch.')}"
            yield _guarded(name, device, partial(_hadamard, device, dtype, tolerance))
        for recipe, config in RECIPES.items():
            yield _guarded(f"HaloLinear, recipe {recipe}", device, partial(_linear, device, config))


def _guarded(name: str, device: torch.device, test: Callable[[], tuple[bool, str]]) -> Check:
    try:
        ok, detail = test()
    except (RuntimeError, ValueError) as error:
        ok, detail = False, str(error)
    return Check(name, device.type, ok, detail)


def _hadamard(device: torch.device, dtype: torch.dtype, tolerance: float) -> tuple[bool, str]:
    worst = 0.0
    for rows, size in _HADAMARD_SIZES:
        x = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(dtype)
        block = size & -size
        exact = (x.double().view(-1, block) @ _sylvester(block)).view(rows, size)
        error = (hadamard_transform(x.to(device)).cpu().double() - exact).norm() / exact.norm()
        worst = max(worst, error.item())
    return worst <= tolerance, f"relative error {worst:.1e}, allowed {tolerance:.0e}"


def _sylvester(order: int) -> Tensor:
    """The orthonormal Hadamard matrix [order, order] in natural order, float64, from its definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / order**0.5


def _linear(device: torch.device, config: HaloConfig) -> tuple[bool, str]:
    """Forward and backward of a HaloLinear under bfloat16 autocast against nn.Linear in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_M, _K, generator=generator).bfloat16()
    e = torch.randn(_M, _N, generator=generator).bfloat16()
    exact = nn.Linear(_K, _N).requires_grad_()
    with torch.no_grad():
        exact.weight.copy_(torch.randn(_N, _K, generator=generator))
    layer = HaloLinear(_K, _N, recipe=config)
    layer.load_state_dict(exact.state_dict())

    want = _products(exact.double(), x.double(), e.double())
    with torch.autocast(device.type, torch.bfloat16):
        got = _products(layer.to(device), x.to(device), e.to(device))
    figures = [sqnr_db(w, g.cpu()).item() for w, g in zip(want, got, strict=True)]
    floor = min(MIN_SQNR_DB[config.format], MIN_SQNR_DB[config.grad_format])
    return min(figures) >= floor, "SQNR " + " / ".join(
        f"{f:.1f}" for f in figures
    ) + f" dB, at least {floor:.0f}"


def _products(layer: nn.Linear, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), e)
    return y.detach(), dx, dw
