"""Hadamard matrices of orders that are no power of two, built and verified in code.

Constructions (q a prime, chi the quadratic character modulo q):

- Paley I, order q + 1 for q = 3 mod 4, and Paley II, order 2 (q + 1) for q = 1 mod 4: R. Paley, J. Math. Phys. 12 (1933).
- Williamson, order 4 n from four symmetric circulants of order n: J. Williamson, Duke Math. J. 11 (1944).
- Cooper-Wallis, order 4 t n from T-sequences of length t and Williamson matrices of order n, in the Goethals-Seidel array:
  J. Cooper and J. Wallis, Bull. Austral. Math. Soc. 7 (1972).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ORDERS = (12, 20, 28, 36, 40, 44, 52, 60, 100, 108, 140, 156, 172)
"""Orders m that are built here; m 2^k follows as a Kronecker product with a Sylvester matrix."""

_T_SEQUENCES: dict[int, list[list[int]]] = {
    # Disjoint, one +-1 at each place, autocorrelations that cancel.
    1: [[1]],
    3: [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    5: [[1, 1, 0, 0, 0], [0, 0, 1, -1, 0], [0, 0, 0, 0, 1]],
}


@functools.cache
def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix H of the given order: entries +-1 with H H^T = order I. In general not symmetric.

    Args:
        order: one of :data:`ORDERS`.

    Returns:
        [order, order] int8 on the CPU; do not modify it, it is cached.

    Raises:
        ValueError: another order; names the nearest.
    """
    if order not in ORDERS:
        nearest = min(ORDERS, key=lambda m: abs(m - order))
        raise ValueError(
            f"order must be one of {', '.join(map(str, ORDERS))}; got {order}; the nearest is {nearest}"
        )
    h = _CONSTRUCTIONS[order]().to(torch.int32)
    if not torch.equal(h @ h.t(), order * torch.eye(order, dtype=torch.int32)):
        raise AssertionError(f"the construction of the Hadamard matrix of order {order} is wrong")
    return h.to(torch.int8)


def _paley_core(q: int) -> Tensor:
    """Q_ij = chi(i - j): 0 on the diagonal, else +1 for a square modulo q and -1 for a non-square."""
    chi = torch.full((q,), -1)
    chi[[x * x % q for x in range(1, q)]] = 1
    chi[0] = 0
    i = torch.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


def _paley_1(q: int) -> Tensor:
    # I + S with S skew: a row of ones, a column of minus ones, the core.
    s = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _paley_core(q)
    return s + torch.eye(q + 1, dtype=torch.int64)


def _paley_2(q: int) -> Tensor:
    # C is a symmetric conference matrix; 0 and +-1 are replaced by 2 x 2 blocks.
    c = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _paley_core(q)
    eye = torch.eye(q + 1, dtype=torch.int64)
    return torch.kron(c, torch.tensor([[1, 1], [1, -1]])) + torch.kron(eye, torch.tensor([[1, -1], [-1, -1]]))


def _williamson_sequences(n: int, multiplier: int) -> list[list[int]]:
    """First rows a, b, c, d of symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4 n I.

    Only sequences that ``multiplier`` leaves unchanged are tried (a_i = a_{multiplier i mod n}), so that a handful of
    free signs is left; two pairs whose power spectra add to 4 n are matched by look-up.
    """
    orbits = _orbits(n, multiplier)
    spectra = {}
    for signs in itertools.product((1, -1), repeat=len(orbits)):
        row = [1] * n
        for sign, orbit in zip(signs, orbits, strict=True):
            for i in orbit:
                row[i] = sign
        transform = [
            sum(row[i] * math.cos(2 * math.pi * i * orbit[0] / n) for i in range(n))
            for orbit in ([0], *orbits)
        ]
        power = [value * value for value in transform]
        if max(power) <= 4 * n + 0.5:
            spectra[signs] = (row, power)
    pairs: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    entries = list(spectra.values())
    for (a, pa), (b, pb) in itertools.combinations_with_replacement(entries, 2):
        total = [x + y for x, y in zip(pa, pb, strict=True)]
        # Rounded to 1e-3 as look-up keys; the matrix is verified exactly afterwards.
        rest = tuple(round(1000 * (4 * n - x)) for x in total)
        pairs.setdefault(tuple(round(1000 * x) for x in total), (a, b))
        if rest in pairs:
            return [a, b, *pairs[rest]]
    raise AssertionError(f"no Williamson sequences of length {n} with multiplier {multiplier}")


def _orbits(n: int, multiplier: int) -> list[list[int]]:
    """Orbits of the nonzero residues modulo n under multiplication by -1 and ``multiplier``."""
    left, orbits = set(range(1, n)), []
    while left:
        orbit, frontier = set(), {min(left)}
        while frontier:
            orbit |= frontier
            frontier = {y for x in frontier for y in (-x % n, x * multiplier % n)} - orbit
        orbits.append(sorted(orbit))
        left -= orbit
    return orbits


def _circulant(row: Sequence[int]) -> Tensor:
    n = len(row)
    i = torch.arange(n)
    return torch.tensor(row)[(i[None, :] - i[:, None]) % n]


def _cooper_wallis(t: int, n: int, multiplier: int = 1) -> Tensor:
    w = [_circulant(row) for row in _williamson_sequences(n, multiplier)]
    x = [_circulant(row) for row in _T_SEQUENCES[t]]
    x += [torch.zeros(t, t, dtype=torch.int64)] * (4 - len(x))

    def combine(signs: Sequence[int], order: Sequence[int]) -> Tensor:
        terms = zip(signs, x, order, strict=True)
        return torch.stack([sign * torch.kron(xi, w[j]) for sign, xi, j in terms]).sum(0)

    a = combine((1, 1, 1, 1), (0, 1, 2, 3))
    b = combine((-1, 1, 1, -1), (1, 0, 3, 2))
    c = combine((-1, -1, 1, 1), (2, 3, 0, 1))
    d = combine((-1, 1, -1, 1), (3, 2, 1, 0))
    return _goethals_seidel(a, b, c, d, reversal=torch.kron(_reversal(t), _reversal(n)))


def _goethals_seidel(a: Tensor, b: Tensor, c: Tensor, d: Tensor, reversal: Tensor) -> Tensor:
    br, cr, dr = b @ reversal, c @ reversal, d @ reversal
    bt, ct, dt = b.t() @ reversal, c.t() @ reversal, d.t() @ reversal
    rows = [[a, br, cr, dr], [-br, a, dt, -ct], [-cr, -dt, a, bt], [-dr, ct, -bt, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _reversal(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.int64).flip(1)


_CONSTRUCTIONS: dict[int, Callable[[], Tensor]] = {
    12: lambda: _paley_1(11),
    20: lambda: _paley_1(19),
    28: lambda: _paley_2(13),
    36: lambda: _paley_2(17),
    40: lambda: torch.kron(torch.tensor([[1, 1], [1, -1]]), _paley_1(19)),
    44: lambda: _paley_1(43),
    52: lambda: _cooper_wallis(1, 13),
    60: lambda: _paley_1(59),
    100: lambda: _cooper_wallis(5, 5),
    108: lambda: _paley_1(107),
    140: lambda: _paley_1(139),
    156: lambda: _cooper_wallis(3, 13),
    172: lambda: _cooper_wallis(1, 43, multiplier=6),
}
