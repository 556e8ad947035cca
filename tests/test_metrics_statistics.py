"""Statistics of tensors and products against NumPy in float64, planted cases included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halo_train import RECIPES, ops, quantize
from halo_train.config import Format, Scaling
from halo_train.metrics.batches import Batches
from halo_train.metrics.operands import round_parts, scale_of_amax
from halo_train.metrics.plan import Plan
from halo_train.metrics.reduce import reduce_inputs
from halo_train.metrics.statistics import (
    STATS_OF,
    Reduced,
    exponents_reduced,
    finish,
    product_reduced,
    rounding_reduced,
    sample_outliers,
    scale_reduced,
)

NOTHING = Plan.of(RECIPES["bf16"], {})


def by_name(found: list[tuple[list[str], Reduced]]) -> dict[tuple[str, str], dict[str, float]]:
    """Stats by name for each layer and key."""
    stats: dict[tuple[str, str], dict[str, float]] = {}
    for layer, key, kind, vector in finish(found):
        stats.setdefault((layer, key), {}).update(zip(STATS_OF[kind], vector, strict=True))
    return stats


def finished(*reduced: Reduced) -> dict[str, float]:
    """Stats by name of one tensor or product."""
    (stats,) = by_name([(["layer"], each) for each in reduced]).values()
    return stats


def whole(x: torch.Tensor) -> dict[str, float]:
    """Stats of a tensor as it is."""
    rows, columns = ops.moments(x)
    sample = {"x_rows": rows, "x_columns": columns, "w_rows": rows, "w_columns": columns}
    found = reduce_inputs(NOTHING, {name: t[None] for name, t in sample.items()})
    return by_name([(["layer"], each) for each in found])["layer", "x"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adahop(variances: np.ndarray, samples: int) -> float:
    """research/adahop_hut_rotations.md, section 1.2."""
    return np.std(variances, ddof=1) / np.mean(variances) / np.sqrt(2 / (samples - 1))


def quantiles_db(exact: np.ndarray, approximate: np.ndarray) -> list[float]:
    """Norm-wise, median, tenth percentile, minimum over rows that have signal."""
    signal, noise = (exact**2).sum(1), ((approximate - exact) ** 2).sum(1)
    kept = signal > 0
    with np.errstate(divide="ignore"):
        rows = np.minimum(10 * np.log10(signal[kept] / noise[kept]), 300)
        total = 10 * np.log10(signal.sum() / noise.sum())
    return [total, np.median(rows), np.quantile(rows, 0.1), rows.min()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("planted", ["nothing", "channels", "tokens", "tiny", "mean"])
def test_whole_tensor(dtype, planted):
    x = torch.randn(192, 80, generator=generator())
    if planted == "channels":
        x[:, [3, 50]] *= 60
    elif planted == "tokens":
        x[[7, 100]] *= 60
    elif planted == "tiny":
        x *= 1e-6 if dtype is torch.float16 else 1e-25
    elif planted == "mean":
        x += 3
    x = x.to(dtype)
    ours = whole(x)
    a = x.double().numpy()
    rms = np.sqrt((a**2).mean())
    expected = {
        "amax": np.abs(a).max(),
        "rms": rms,
        "crest": np.abs(a).max() / rms,
        "nonfinite": 0.0,
        "row_outliers": adahop(a.var(1, ddof=1), 80),
        "column_outliers": adahop(a.var(0, ddof=1), 192),
    }
    assert ours == pytest.approx(expected, rel=2e-4)
    if planted in ("channels", "tokens"):
        hot, cold = ("column_outliers", "row_outliers")[:: 1 if planted == "channels" else -1]
        assert ours[hot] > 2 * ours[cold]  # AdaHOP's threshold
    elif planted == "nothing":
        assert 0.7 < ours["row_outliers"] < 1.3
        assert 0.7 < ours["column_outliers"] < 1.3


def test_scaled_rms_is_that_of_the_scaled_tensor():
    x, rows, columns = (
        torch.randn(s, generator=generator(i)) for i, s in enumerate([(50, 30), (50,), (30,)])
    )
    amax = torch.tensor([[7e-12]], dtype=torch.float64)
    of_rows, of_columns = ops.moments(x * 1e-12)
    for squares, scaled in (
        (of_rows[2] * rows.square(), x * rows[:, None]),
        (of_columns[1] * columns.square(), x * columns),
    ):
        ours = finished(scale_reduced((("x",),), amax, squares[None, None], x.numel()))
        rms = 1e-12 * scaled.square().mean().sqrt().item()
        assert ours == pytest.approx({"amax": 7e-12, "rms": rms, "crest": 7e-12 / rms})


def test_not_finite_rows_are_counted_and_seen():
    x = torch.randn(40, 16, generator=generator())
    x[3, 2], x[9, 9] = float("nan"), float("inf")
    ours = whole(x)
    assert ours["nonfinite"] == 2 / 40
    assert np.isnan(ours["amax"])


def test_zero_tensor_gives_no_ratio_and_no_error():
    ours = whole(torch.zeros(8, 8))
    assert ours["amax"] == ours["rms"] == ours["nonfinite"] == 0


def rounded(before: torch.Tensor, data: torch.Tensor, largest: float) -> Reduced:
    """Rounding of tensors [T, R, Q], named a, b, ...; data: what is stored of them, with scale 1."""
    of_rows, _, _ = ops.rounding_moments(before, data, torch.ones(before.shape[:2]), largest, 1)
    names = tuple((name,) for name in "abcd"[: len(before)])
    return rounding_reduced(names, of_rows[None], before.shape[-1])


def test_rounding_moments_name_what_does_not_fit():
    x, scale = torch.ones(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"scale \[B, R\]; got \(2, 3, 4\), \(2, 3, 4\) and \(3, 2\); pass what quantize"
    ):
        ops.rounding_moments(x, x, scale.t(), 1.0, 1)
    with pytest.raises(ValueError, match="counted must be at least 1, every row; got 0"):
        ops.rounding_moments(x, x, scale, 1.0, 0)


def test_rounding_of_a_batch():
    before = torch.randn(2, 60, 100, generator=generator(), dtype=torch.float64)
    before[0] *= torch.exp(3 * torch.randn(60, 1, generator=generator(1), dtype=torch.float64))
    before[1, 40:] = 0  # padding tokens
    after = torch.round(before * 8) / 8
    limit = after.abs() >= 2
    reduced = rounded(before, after, 2.0)._replace(names=(("a",), ("b", "same")))
    stats = by_name([(["layer"], reduced)])
    assert stats["layer", "same"] == stats["layer", "b"]
    ours = [list(stats["layer", key].values()) for key in "ab"]
    for i in range(2):
        a, b = before[i].numpy(), after[i].numpy()
        nonzero = a != 0
        expected = [
            (a**4).mean() / (a**2).mean() ** 2,
            (nonzero & (b == 0)).sum() / nonzero.sum(),
            (nonzero & limit[i].numpy()).sum() / nonzero.sum(),
            *quantiles_db(a, b),
        ]
        assert ours[i] == pytest.approx(expected, rel=1e-12)


def test_a_gradient_that_underflows():
    before = torch.full((10, 64), 1e-9, dtype=torch.float64)
    before[:, 0] = 1.0
    after = torch.where(before < 1e-3, 0.0, before)
    stats = finished(rounded(before[None], after[None], 1.0))
    assert stats["underflow"] == pytest.approx(63 / 64)
    assert stats["saturation"] == pytest.approx(1 / 64)
    assert stats["sqnr_db"] > 100  # the norm hides it


def test_products():
    exact = torch.randn(70, 50, generator=generator(), dtype=torch.float64) + 0.5
    noise = torch.randn(3, 70, 50, generator=generator(1), dtype=torch.float64)
    approximate = (
        exact * torch.tensor([1.0, 0.9, 1.0])[:, None, None]
        + noise * torch.tensor([0.01, 0.01, 0])[:, None, None]
    )
    reduced = product_reduced((("a",), ("b",), ("c",)), exact[None, None], approximate[None])
    ours = np.array([list(stats.values()) for stats in by_name([(["layer"], reduced)]).values()])
    a = exact.numpy()
    for i in range(2):
        b = approximate[i].numpy()
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        bias = ((b - a) * a).sum() / (a * a).sum()
        assert list(ours[i]) == pytest.approx([*quantiles_db(a, b), cosine, bias], rel=1e-9)
    assert ours[1, STATS_OF["product"].index("bias")].item() == pytest.approx(-0.1, abs=1e-3)
    assert list(ours[2]) == pytest.approx([300, 300, 300, 300, 1, 0])


def product(exact: torch.Tensor, approximate: torch.Tensor) -> dict[str, float]:
    return finished(product_reduced((("fprop",),), exact[None, None], approximate[None, None]))


def test_dead_tokens_show_in_the_median_only():
    exact = torch.randn(100, 32, generator=generator(), dtype=torch.float64)
    exact[:10] *= 1e6
    approximate = exact.clone()
    approximate[10:] = 0
    approximate[:10] *= 1.01
    stats = product(exact, approximate)
    assert stats["sqnr_db"] == pytest.approx(40, abs=0.1)
    assert stats["median_db"] == stats["p10_db"] == stats["min_db"] == 0


def test_broken_rows():
    exact = torch.randn(10, 8, generator=generator(), dtype=torch.float64)
    approximate = exact * 1.1
    approximate[0] = float("nan")  # by rounding
    exact[1] = approximate[1] = float("nan")  # from the data
    exact[2] = 0  # padding
    stats = product(exact, approximate)
    assert np.isnan(stats["sqnr_db"])
    assert stats["min_db"] == -300
    assert stats["median_db"] == pytest.approx(20)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    assert all(np.isnan(list(product(zeros, zeros).values())))


def exponents(x: torch.Tensor) -> list[float]:
    counts = ops.rounding_moments(x[None], x[None], torch.ones(1, len(x)), 1.0, 1)[2]
    (found,) = finish([(["layer"], exponents_reduced((("x",),), counts[None]))])
    return found[3]


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**60])
def test_exponent_histogram(scale):
    x = torch.tensor([[8.0, 7.9, 4.0, 2.0], [1.0, 0.0, -8.5, 2.0**-45]]) * scale
    expected = np.zeros(32)
    np.add.at(expected, [0, 1, 1, 2, 3, 0, 31], 1 / 7)
    assert exponents(x) == pytest.approx(expected.tolist())
    x[0, 0] = float("nan")
    assert sum(exponents(x)) == pytest.approx(1)


def test_exponents_of_every_float():
    """The smallest and the largest of every binary order of float32, those below its normal range included."""
    orders = np.arange(-149, 128)
    lowest = np.ldexp(1.0, orders)
    highest = np.where(orders < -126, 2 * lowest - 2.0**-149, 2 * lowest * (1 - 2.0**-24))
    x = torch.tensor(np.stack([lowest, -highest]), dtype=torch.float32)
    counts = ops.rounding_moments(x[None], x[None], torch.ones(1, 2), 1.0, 1)[2]
    assert counts.tolist() == [[2] * 277]


def test_outliers_of_a_sampled_matrix():
    x = torch.randn(64, 48, generator=generator(), dtype=torch.float64)
    x[:, 5] *= 30
    of_rows, of_columns, _ = ops.rounding_moments(x[None], x[None], torch.ones(1, 64), 1.0, 1)
    ours = finished(*sample_outliers((("x",),), of_rows[None], of_columns[None]))
    assert ours["row_outliers"] == pytest.approx(adahop(x.numpy().var(1, ddof=1), 48))
    assert ours["column_outliers"] == pytest.approx(adahop(x.numpy().var(0, ddof=1), 64))
    assert ours["column_outliers"] > 2 * ours["row_outliers"]


def test_exponents_of_several_tensors_stay_apart():
    tensors = [torch.randn(128, 40, generator=generator(i)) * 10.0 ** (9 * i - 18) for i in range(6)]
    tensors[2][:, 3] = 0
    stacked = torch.stack(tensors)
    counts = ops.rounding_moments(stacked, stacked, torch.ones(6, 128), 1.0, 4)[2]
    found = list(finish([(["a", "b", "c"], exponents_reduced((("x",), ("w",)), counts.view(3, 2, -1)))]))
    assert [each[:2] for each in found] == [(layer, part) for layer in "abc" for part in "xw"]
    for x, (*_, ours) in zip(tensors, found, strict=True):
        order = np.floor(np.log2(np.abs(x[::4][x[::4] != 0].double().numpy())))  # 32 of the 128 rows
        near = np.minimum(order.max() - order, 31).astype(int)
        assert ours == pytest.approx((np.bincount(near, minlength=32) / near.size).tolist(), abs=1e-6)


def samples(count: int) -> dict[str, dict[str, torch.Tensor]]:
    """What reduce_inputs takes, of layers of two shapes by name."""
    found = {}
    for i in range(count):
        x, w = (torch.randn(s, 16 + i % 2, generator=generator(i)) * (i + 1) for s in (8, 6))
        (x_rows, x_columns), (w_rows, w_columns) = ops.moments(x), ops.moments(w)
        found[f"layer{i}"] = {
            "x_rows": x_rows,
            "x_columns": x_columns,
            "w_rows": w_rows,
            "w_columns": w_columns,
        }
    return found


def test_layers_are_reduced_together_and_keep_their_names():
    together, layers = Batches(), samples(7)
    for name, sample in layers.items():
        together.add(name, reduce_inputs, NOTHING, sample)
    assert not together.found
    together.flush()
    stats = by_name(together.found)
    assert {layer for layer, _ in stats} == set(layers)
    for name, sample in layers.items():
        alone = Batches()
        alone.add(name, reduce_inputs, NOTHING, sample)
        alone.flush()
        for key, expected in by_name(alone.found).items():
            assert stats[key] == pytest.approx(expected, rel=1e-12)


def test_full_batches_do_not_wait(monkeypatch):
    """The largest tensor of a sample has 32 elements."""
    monkeypatch.setattr("halo_train.metrics.batches.FULL", 2 * 32)
    batches = Batches()
    for name, sample in samples(5).items():
        batches.add(name, reduce_inputs, NOTHING, {k: v[..., :16] for k, v in sample.items()})
    assert [layers for layers, reduced in batches.found if reduced.kind == "scale"] == [
        *[["layer0", "layer1"]] * 2,
        *[["layer2", "layer3"]] * 2,
    ]
    batches.flush()
    assert batches.found[-1][0] == ["layer4"]


def test_a_what_if_recipe_that_runs_anyway_is_measured_once():
    plan = Plan.of(RECIPES["fp8"], {name: RECIPES[name] for name in ("halo0_fp8", "fp8", "bf16", "int8")})
    assert plan.names("dgrad") == (("dgrad", "dgrad@fp8"), ("dgrad@halo0_fp8",), ("dgrad@int8",))
    assert [plan.configs[i].name for i in plan.changed] == ["fp8", "int8"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "int8"])
def test_parts_are_rounded_as_the_whole(fmt, dtype):
    """Bit for bit, with one scale or one a row; rows of zeros and NaN too."""
    x = (torch.randn(40, 72, generator=generator()) * 3e-3).to(dtype)
    x[7] = 0
    columns, rows = torch.tensor([5, 0, 71]), torch.tensor([7, 31])
    for planted in (False, True):
        if planted:
            x[31, 4] = float("nan")
        amax = ops.moments(x)[0][0]
        for scaling in Scaling:
            known = amax if scaling is Scaling.ROWWISE else amax.max().expand(40)
            q = quantize(x, fmt, scaling=scaling)
            for part, its_amax, expected in (
                (x[:, columns], known, q.dequantize()[:, columns]),
                (x[rows], known[rows], q.dequantize()[rows]),
            ):
                ours = round_parts(part, its_amax, Format(fmt))
                assert ours.scale.shape == expected.shape[:1]
                assert torch.equal(ours.dequantize().nan_to_num(7), expected.nan_to_num(7))
            scales = scale_of_amax(known, dtype, Format(fmt))
            assert torch.equal(scales.nan_to_num(7), q.scale.expand(40).nan_to_num(7))
