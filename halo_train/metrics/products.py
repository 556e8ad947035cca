"""measure_products(): what the rounding costs each of the three products of each layer, once, over whole tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HaloConfig, resolve_recipe
from ..functional import halo_linear
from ..linear import HaloLinear, halo_linears
from ..quantize import equalizer_exponents

PRODUCTS = ("fprop", "dgrad", "wgrad")


@dataclasses.dataclass(frozen=True)
class ProductError:
    """Signal-to-quantisation-noise ratio of one product, in dB; higher is better, 6 dB is a factor of two in error.

    A norm-wise figure is dominated by the largest tokens and hides those that were flushed to zero, hence the other two.
    """

    sqnr_db: float
    """20 log10(||P|| / ||P - P_8bit||) over the whole product P."""
    median_db: float
    """Median over tokens (rows of Y and dX), for dW over its columns."""
    p10_db: float
    """Tenth percentile over the same."""


def sqnr_db(exact: Tensor, approximate: Tensor, dim: int | None = None) -> Tensor:
    """20 log10(||exact|| / ||exact - approximate||), over everything or along ``dim``; inf where they are equal."""
    noise = (exact - approximate.to(exact.dtype)).norm(dim=dim)
    return 20 * torch.log10(exact.norm(dim=dim) / noise)


def product_errors(
    x: Tensor, weight: Tensor, e: Tensor, config: HaloConfig, equalizer: Tensor | None = None
) -> dict[str, ProductError]:
    """Errors of the three products against the same products in float64.

    Args:
        x: [M, K], weight: [N, K], e: [M, N] = dL/dY.
        equalizer: d [K]; None with an equalising config takes d from x and weight.

    Returns:
        ``{"fprop": ..., "dgrad": ..., "wgrad": ...}``.
    """
    if config.equalize and equalizer is None:
        equalizer = torch.exp2(equalizer_exponents(x, weight).float())
    x_in, w_in = x.detach().requires_grad_(), weight.detach().to(x.dtype).requires_grad_()
    with torch.enable_grad():
        y = halo_linear(x_in, w_in, config=config, equalizer=equalizer)
        dx, dw = torch.autograd.grad(y, (x_in, w_in), e.to(y.dtype))
    x64, w64, e64 = x.double(), weight.double(), e.double()
    return {
        "fprop": _error(x64 @ w64.t(), y.detach(), dim=1),
        "dgrad": _error(e64 @ w64, dx, dim=1),
        "wgrad": _error(e64.t() @ x64, dw, dim=0),
    }


def measure_products(
    model: nn.Module, step_fn: Callable[[], Any], recipe: str | HaloConfig | None = None
) -> dict[str, dict[str, ProductError]]:
    """Errors of every HaloLinear on real data: its own X and E of one forward and backward.

    Args:
        model: converted by convert_to_halo_training.
        step_fn: runs one forward and backward; gradients that it leaves behind are the caller's to clear.
        recipe: None measures each layer's own recipe; a recipe asks "what if" on the same X, W and E.

    Returns:
        ``{layer name: {product: ProductError}}`` for the layers that took part; a layer that is called several times is
        measured at its first call.

    Raises:
        ValueError: no HaloLinear in the model, or step_fn ran no backward through one.
    """
    config = None if recipe is None else resolve_recipe(recipe)
    layers = dict(halo_linears(model))
    if not layers:
        raise ValueError("measure_products: the model has no HaloLinear; call convert_to_halo_training first")
    errors: dict[str, dict[str, ProductError]] = {}
    handles = [layer.register_forward_hook(_probe(name, config, errors)) for name, layer in layers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would call no hooks
            step_fn()
    finally:
        for handle in handles:
            handle.remove()
    if not errors:
        raise ValueError(
            "measure_products: step_fn ran no backward through a HaloLinear; call loss.backward() in it"
        )
    return {name: errors[name] for name in layers if name in errors}


def _probe(
    name: str, config: HaloConfig | None, errors: dict[str, dict[str, ProductError]]
) -> Callable[[HaloLinear, tuple[Tensor, ...], Tensor], None]:
    seen = False

    def hook(layer: HaloLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal seen
        if seen or not y.requires_grad:
            return
        seen = True
        x = args[0].detach().reshape(-1, layer.in_features).to(y.dtype)
        used = config or layer.running_config

        def on_grad(e: Tensor) -> None:
            equalizer = layer.equalizer() if used.equalize else None
            flat = e.reshape(-1, layer.out_features)
            errors[name] = product_errors(x, layer.whole_weight(), flat, used, equalizer)

        y.register_hook(on_grad)

    return hook


def _error(exact: Tensor, approximate: Tensor, dim: int) -> ProductError:
    per_row = sqnr_db(exact, approximate, dim=dim)
    # Rows without signal (padding tokens have E = 0) say nothing about rounding.
    per_row = per_row[exact.norm(dim=dim) > 0]
    if per_row.numel() == 0:
        return ProductError(float("nan"), float("nan"), float("nan"))
    p10, median = torch.quantile(per_row.double(), per_row.new_tensor([0.1, 0.5]).double()).tolist()
    return ProductError(sqnr_db(exact, approximate).item(), median, p10)
