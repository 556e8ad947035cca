"""What a rotated 8-bit linear layer computes: number formats, scale granularity, placement of the rotations, named recipes.

Symbols as in docs/numerics.md: X [M, K] tokens x in_features, W [N, K], E = dL/dY [M, N]; Q(.) rounds to 8 bits;
H_K and H_M are orthonormal Hadamard rotations of the K (in_features) and M (token) axis; D = diag(d) equalises channels.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

import torch

_Choice = TypeVar("_Choice", bound=Enum)


class Format(str, Enum):
    """Number format of a quantised operand; the value is the name used in recipes and YAML files."""

    E4M3 = "e4m3"
    """float8_e4m3fn: 4 exponent and 3 mantissa bits, largest finite value 448."""
    E5M2 = "e5m2"
    """float8_e5m2: 5 exponent and 2 mantissa bits, largest finite value 57344."""
    INT8 = "int8"
    """Symmetric integers -127..127."""
    UNROUNDED = "unrounded"
    """Scaled to [-1, 1] and kept in float32 (float64 for float64 input): the algebra of a recipe without its rounding."""
    HIGH_PRECISION = "high_precision"
    """Not quantised at all: the layer is torch.nn.functional.linear."""


class Scaling(str, Enum):
    """How many scales an operand has."""

    ROWWISE = "rowwise"
    """One scale per stored row."""
    TENSORWISE = "tensorwise"
    """One scale per tensor."""


class Recompute(str, Enum):
    """What backward computes once more, to the same bits, instead of keeping it from forward; each also what those before it do."""

    NOTHING = "nothing"
    """Kept are inputs in 8 bits and, by a fused gated MLP, gate and up in the dtype of the products."""
    INPUTS = "inputs"
    """X is rounded once more: in fused blocks a norm's output and h, from what they keep anyway; in a layer by itself from x in its
    own dtype, which costs nothing where the op before keeps it, as attention does."""
    MLP = "mlp"
    """A fused gated MLP keeps its input only, and multiplies by gate and up once more."""


@dataclasses.dataclass(frozen=True)
class HaloConfig:
    """How one linear layer runs its three products. Frozen and hashable; build it from a recipe name or by field.

    Raises:
        ValueError: for a combination of fields that no product can run.
    """

    format: Format = Format.E4M3
    """Format of X and W in all three products."""
    grad_format: Format = Format.E4M3
    """Format of E in dgrad and wgrad."""
    scaling: Scaling = Scaling.ROWWISE
    """ROWWISE folds the scales that lie on a contracted axis into E before E is rounded (docs/numerics.md, eq. 5f, 6)."""
    rotate_k: bool = True
    """Rotate X and W along K: inner in fprop, undone on the output of wgrad, and of dgrad where that takes the rotated W."""
    rotate_m_dgrad: bool = False
    """Rotate E along M before it is rounded for dgrad, undone on dX (HALO-2)."""
    requantize_w_dgrad: bool = True
    """Round W once more for dgrad, neither rotated nor equalised, with one scale a column: nothing is undone on dX
    (eq. 5, 5i). False: dgrad takes the W of fprop (eq. 5f)."""
    equalize: bool = True
    """Divide the columns of X by d and multiply those of W by d, d a power of two per channel, before rotating."""
    fast_accum: bool = True
    """Float8 products on a GPU: sums with the few bits that the tensor core keeps, or in float32, slower."""
    recompute: Recompute = Recompute.NOTHING
    """What is not kept for backward: memory for time, at the same results."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", parse_choice(Format, "format", self.format))
        object.__setattr__(self, "grad_format", parse_choice(Format, "grad_format", self.grad_format))
        object.__setattr__(self, "scaling", parse_choice(Scaling, "scaling", self.scaling))
        object.__setattr__(self, "recompute", parse_choice(Recompute, "recompute", self.recompute))
        kinds = {_arithmetic(self.format), _arithmetic(self.grad_format)}
        if len(kinds) > 1:
            raise ValueError(
                f"HaloConfig: format and grad_format must use the same arithmetic (both float8 or both int8), because "
                f"one GEMM multiplies them; got format={self.format.value!r}, grad_format={self.grad_format.value!r}"
            )
        if self.format is Format.E5M2 and self.grad_format is Format.E5M2:
            raise ValueError(
                "HaloConfig: format and grad_format cannot both be 'e5m2', because no library GEMM multiplies e5m2 by "
                "e5m2; use format='e4m3'"
            )
        if self.format is Format.HIGH_PRECISION and (self.rotate_k or self.rotate_m_dgrad or self.equalize):
            raise ValueError(
                "HaloConfig: format='high_precision' computes F.linear and takes no rotation and no equalisation; got "
                f"rotate_k={self.rotate_k}, rotate_m_dgrad={self.rotate_m_dgrad}, equalize={self.equalize}; set them to "
                "False or choose an 8-bit format"
            )
        if self.requantize_w_dgrad and (
            self.scaling is Scaling.TENSORWISE or self.format is Format.HIGH_PRECISION
        ):
            raise ValueError(
                "HaloConfig: requantize_w_dgrad rounds the columns of W with scales of their own, which needs "
                f"scaling='rowwise' and an 8-bit format; got scaling={self.scaling.value!r}, format={self.format.value!r}; set it "
                "to False"
            )

    @staticmethod
    def from_recipe(name: str) -> HaloConfig:
        """The config of a named recipe; see :data:`RECIPES`.

        Raises:
            ValueError: unknown name; the message has the nearest valid one and the whole list.
        """
        if name not in RECIPES:
            raise ValueError(
                f"recipe must be one of {', '.join(RECIPES)}; got {name!r}{did_you_mean(name, RECIPES)}"
            )
        return RECIPES[name]

    def without_rounding(self) -> HaloConfig:
        """The same rotations, scales and folds with the rounding left out: equal to nn.Linear up to float error."""
        if self.format is Format.HIGH_PRECISION:
            return self
        return dataclasses.replace(self, format=Format.UNROUNDED, grad_format=Format.UNROUNDED)

    @functools.cached_property
    def with_folded_dgrad(self) -> HaloConfig:
        """The same with a dgrad that takes the W of fprop, for a weight of which only that rounded form exists."""
        return dataclasses.replace(self, requantize_w_dgrad=False) if self.requantize_w_dgrad else self

    @property
    def levels_w_dgrad(self) -> bool:
        """Whether the rows of W are divided by levels before W is rounded once more for dgrad, and E multiplied by them (eq. 5i).

        In int8, whose steps are even: else one large row would take the bits of all others.
        """
        return self.requantize_w_dgrad and self.format is Format.INT8

    @property
    def allows_blocks(self) -> bool:
        """Whether E may have a scale for each row and block of the contraction, and W of dgrad one for each tile: of e4m3 with fast sums
        there is a kernel, on Hopper, that multiplies by such scales."""
        both = self.format is Format.E4M3 and self.grad_format is Format.E4M3
        plain = self.scaling is Scaling.ROWWISE and not self.rotate_m_dgrad
        return both and plain and self.fast_accum

    @functools.cached_property
    def with_recomputed_inputs(self) -> HaloConfig:
        """The same with X rounded once more in backward, for an X that is kept anyway."""
        return self if self.recomputes_inputs else dataclasses.replace(self, recompute=Recompute.INPUTS)

    @property
    def recomputes_inputs(self) -> bool:
        """Whether X is rounded once more in backward."""
        return self.recompute is not Recompute.NOTHING

    @property
    def name(self) -> str:
        """Recipe name, with what differs where that is sums or what is recomputed; or the fields of a config that is no named recipe."""
        others = [] if self.fast_accum else ["fast_accum=False"]
        others += [] if self.recompute is Recompute.NOTHING else [f"recompute={self.recompute.value}"]
        for name, config in RECIPES.items():
            if dataclasses.replace(config, fast_accum=self.fast_accum, recompute=self.recompute) == self:
                return ", ".join([name, *others])
        parts = [self.format.value, f"grad_{self.grad_format.value}", self.scaling.value]
        flags = ("rotate_k", "rotate_m_dgrad", "requantize_w_dgrad", "equalize")
        parts += [flag for flag in flags if getattr(self, flag)]
        return "custom(" + ", ".join(parts + others) + ")"


def resolve_recipe(recipe: str | HaloConfig) -> HaloConfig:
    """A config from a recipe name or a config.

    Raises:
        ValueError: unknown recipe name.
        TypeError: neither a name nor a config.
    """
    if isinstance(recipe, HaloConfig):
        return recipe
    if isinstance(recipe, str):
        return HaloConfig.from_recipe(recipe)
    raise TypeError(f"recipe must be a recipe name or a HaloConfig; got {type(recipe).__name__}")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the valid name nearest to ``name``, or an empty string when none is near."""
    by_lower = {choice.lower(): choice for choice in valid}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def parse_choice(kind: type[_Choice], field: str, value: str | _Choice) -> _Choice:
    """The member of an enum from its value.

    Raises:
        ValueError: no such member; names ``field``, the valid values and the nearest one.
    """
    if isinstance(value, kind):  # torch.compile cannot call an enum in a backward before torch 2.12
        return value
    try:
        return kind(value)
    except ValueError:
        valid = [member.value for member in kind]
        raise ValueError(
            f"{field} must be one of {', '.join(valid)}; got {value!r}{did_you_mean(str(value), valid)}"
        ) from None


def storage_dtype(fmt: Format, input_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operand of this format is stored, given the dtype of the values it is made from."""
    if fmt in _STORED:
        return _STORED[fmt]
    if fmt is Format.HIGH_PRECISION:
        raise ValueError("format='high_precision' has no quantised form; choose 'e4m3', 'e5m2' or 'int8'")
    return torch.promote_types(input_dtype, torch.float32)


_STORED = {Format.E4M3: torch.float8_e4m3fn, Format.E5M2: torch.float8_e5m2, Format.INT8: torch.int8}


def _arithmetic(fmt: Format) -> str:
    return "float8" if fmt in (Format.E4M3, Format.E5M2) else fmt.value


def _halo(level: int, fmt: Format) -> HaloConfig:
    return HaloConfig(
        format=fmt,
        grad_format=fmt,
        scaling=Scaling.TENSORWISE,
        rotate_k=level >= 1,
        rotate_m_dgrad=level >= 2,
        requantize_w_dgrad=False,
        equalize=False,
    )


RECIPES: dict[str, HaloConfig] = {
    # (X D^-1) H_K = diag(s) Xq,  (W D) H_K = diag(t) Wq;  Y  = diag(s) (Xq Wq^T) diag(t)
    # Q(E) = diag(u) Ea,  Q(W^T) = diag(c) Wc;              dX = diag(u) (Ea Wc^T) diag(c)
    # Q((diag(s) E)^T) = diag(v) Eb;                       dW = diag(v) (Eb Xq) H_K^T D
    "fp8": HaloConfig(),
    # the same in integers
    "int8": HaloConfig(format=Format.INT8, grad_format=Format.INT8),
    # the same with H_K = D = 1 and Q(E diag(t)) = diag(u) Ea;  dX = diag(u) (Ea Wq)
    "fp8_plain": HaloConfig(rotate_k=False, requantize_w_dgrad=False, equalize=False),
    # Y = X W^T, dX = E W, dW = E^T X
    "bf16": HaloConfig(
        format=Format.HIGH_PRECISION,
        grad_format=Format.HIGH_PRECISION,
        rotate_k=False,
        requantize_w_dgrad=False,
        equalize=False,
    ),
    # HALO v2 (arXiv 2501.02625) Table 1, one scale a tensor.
    # HALO-0: Y = Q(X) Q(W)^T,  dX = Q(E) Q(W),  dW = Q(E)^T Q(X)
    "halo0_fp8": _halo(0, Format.E4M3),
    "halo0_int8": _halo(0, Format.INT8),
    # HALO-1: Y = Q(X H_K) Q(W H_K)^T,  dX = Q(E) Q(W H_K) H_K^T,  dW = Q(E)^T Q(X H_K) H_K^T
    "halo1_fp8": _halo(1, Format.E4M3),
    "halo1_int8": _halo(1, Format.INT8),
    # HALO-2: Y and dW as HALO-1,  dX = H_M^T Q(H_M E) Q(W H_K) H_K^T
    "halo2_fp8": _halo(2, Format.E4M3),
    "halo2_int8": _halo(2, Format.INT8),
}
