"""Statistics of tensors and products against NumPy in float64, planted cases included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halo_train import RECIPES, quantize
from halo_train.config import Format, Scaling
from halo_train.metrics.batches import Batches
from halo_train.metrics.operands import SampledRows, Unrotated, round_operand
from halo_train.metrics.statistics import (
    STATS_OF,
    Reduction,
    WholeTensor,
    exponent_reductions,
    finish,
    outlier_reductions,
    product_reductions,
    rounding_reductions,
)
from halo_train.operands import quantize_operands
from halo_train.quantize import Equalizer


def finished(reductions: list[Reduction]) -> dict[str, float]:
    """Stats by name of the reductions of one tensor."""
    named = {}
    for reduction, vector in zip(reductions, finish(reductions), strict=True):
        named.update(zip(STATS_OF[reduction.kind], vector, strict=False))
    return named


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
    ours = finished(WholeTensor.of(x).reductions())
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
    whole, amax = WholeTensor.of(x * 1e-12), torch.tensor(7e-12)
    for squares, scaled in (
        (whole.row_square * rows.square(), x * rows[:, None]),
        (whole.col_square * columns.square(), x * columns),
    ):
        ours = finished([whole.scale(amax, squares)])
        rms = 1e-12 * scaled.square().mean().sqrt().item()
        assert ours == pytest.approx({"amax": 7e-12, "rms": rms, "crest": 7e-12 / rms})


def test_not_finite_rows_are_counted_and_seen():
    x = torch.randn(40, 16, generator=generator())
    x[3, 2], x[9, 9] = float("nan"), float("inf")
    ours = finished(WholeTensor.of(x).reductions())
    assert ours["nonfinite"] == 2 / 40
    assert np.isnan(ours["amax"])


def test_zero_tensor_gives_no_ratio_and_no_error():
    ours = finished(WholeTensor.of(torch.zeros(8, 8)).reductions())
    assert ours["amax"] == ours["rms"] == ours["nonfinite"] == 0


def test_rounding_of_a_batch():
    before = torch.randn(2, 60, 100, generator=generator(), dtype=torch.float64)
    before[0] *= torch.exp(3 * torch.randn(60, 1, generator=generator(1), dtype=torch.float64))
    before[1, 40:] = 0  # padding tokens
    after = torch.round(before * 8) / 8
    limit = after.abs() >= 2
    ours = np.array(finish(rounding_reductions(before, after, limit)))
    for i in range(2):
        a, b = before[i].numpy(), after[i].numpy()
        nonzero = a != 0
        expected = [
            (a**4).mean() / (a**2).mean() ** 2,
            (nonzero & (b == 0)).sum() / nonzero.sum(),
            (nonzero & limit[i].numpy()).sum() / nonzero.sum(),
            *quantiles_db(a, b),
        ]
        assert list(ours[i]) == pytest.approx(expected, rel=1e-12)
    assert ours.shape == (2, len(STATS_OF["rounding"]))


def test_a_gradient_that_underflows():
    before = torch.full((10, 64), 1e-9, dtype=torch.float64)
    before[:, 0] = 1.0
    after = torch.where(before < 1e-3, 0.0, before)
    stats = finished(rounding_reductions(before[None], after[None], after[None] >= 1))
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
    ours = np.array(finish(product_reductions(exact, approximate)))
    a = exact.numpy()
    for i in range(2):
        b = approximate[i].numpy()
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        bias = ((b - a) * a).sum() / (a * a).sum()
        assert list(ours[i]) == pytest.approx([*quantiles_db(a, b), cosine, bias], rel=1e-9)
    assert ours[1, STATS_OF["product"].index("bias")].item() == pytest.approx(-0.1, abs=1e-3)
    assert list(ours[2]) == pytest.approx([300, 300, 300, 300, 1, 0])


def test_dead_tokens_show_in_the_median_only():
    exact = torch.randn(100, 32, generator=generator(), dtype=torch.float64)
    exact[:10] *= 1e6
    approximate = exact.clone()
    approximate[10:] = 0
    approximate[:10] *= 1.01
    stats = finished(product_reductions(exact, approximate[None]))
    assert stats["sqnr_db"] == pytest.approx(40, abs=0.1)
    assert stats["median_db"] == stats["p10_db"] == stats["min_db"] == 0


def test_broken_rows():
    exact = torch.randn(10, 8, generator=generator(), dtype=torch.float64)
    approximate = exact * 1.1
    approximate[0] = float("nan")  # by rounding
    exact[1] = approximate[1] = float("nan")  # from the data
    exact[2] = 0  # padding
    stats = finished(product_reductions(exact, approximate[None]))
    assert np.isnan(stats["sqnr_db"])
    assert stats["min_db"] == -300
    assert stats["median_db"] == pytest.approx(20)
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64)
    assert all(np.isnan(list(finished(product_reductions(zeros[0], zeros)).values())))


def exponents(x: torch.Tensor) -> list[float]:
    return finish(exponent_reductions(x.double()[None]))[0]


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**60])
def test_exponent_histogram(scale):
    x = torch.tensor([[8.0, 7.9, 4.0, 2.0], [1.0, 0.0, -8.5, 2.0**-45]]) * scale
    expected = np.zeros(32)
    np.add.at(expected, [0, 1, 1, 2, 3, 0, 31], 1 / 7)
    assert exponents(x) == pytest.approx(expected.tolist())
    x[0, 0] = float("nan")
    assert sum(exponents(x)) == pytest.approx(1)


def test_outliers_of_a_sampled_matrix():
    x = torch.randn(64, 48, generator=generator(), dtype=torch.float64)
    x[:, 5] *= 30
    ours = finished(outlier_reductions(x[None])[0])
    assert ours["row_outliers"] == pytest.approx(adahop(x.numpy().var(1, ddof=1), 48))
    assert ours["column_outliers"] == pytest.approx(adahop(x.numpy().var(0, ddof=1), 64))
    assert ours["column_outliers"] > 2 * ours["row_outliers"]


def test_layers_are_finished_in_batches_and_come_back_in_order():
    tensors = [torch.randn(8 + i % 2, 16, generator=generator(i)) * (i + 1) for i in range(6)]
    together = finish([r for t in tensors for r in WholeTensor.of(t).reductions()])
    alone = [v for t in tensors for r in WholeTensor.of(t).reductions() for v in finish([r])]
    assert all(np.allclose(a, b, rtol=1e-12) for a, b in zip(together, alone, strict=True))


def test_exponents_of_several_tensors_stay_apart():
    tensors = [torch.randn(128, 40, generator=generator(i)) * 10.0 ** (9 * i - 18) for i in range(5)]
    tensors[2][:, 3] = 0
    together = finish(exponent_reductions(torch.stack(tensors).double()))
    for x, ours in zip(tensors, together, strict=True):
        order = np.floor(np.log2(np.abs(x[::4][x[::4] != 0].double().numpy())))  # 32 of the 128 rows
        near = np.minimum(order.max() - order, 31).astype(int)
        assert ours == pytest.approx((np.bincount(near, minlength=32) / near.size).tolist(), abs=1e-6)


def test_batches_of_samples():
    """In one batch or one by one, and whichever is full first, each list gets what its own sample says."""
    samples = [torch.randn(6, 40, generator=generator(i)) * (i + 1) for i in range(4)]
    rounded = [quantize(x, "e4m3") for x in samples]
    alone = []
    for x, q in zip(samples, rounded, strict=True):
        batches, tensor, operand = Batches(), [], []
        batches.add_tensor(tensor, x, q, 33)
        batches.add_operand(operand, x, q, 33)
        batches.flush()
        alone.append((finished(tensor), finished(operand)))
        expected = quantiles_db(*(t[:, :33].double().numpy() for t in (x, q.dequantize())))
        assert [alone[-1][0][k] for k in ("sqnr_db", "median_db", "p10_db", "min_db")] == pytest.approx(
            expected
        )
        assert alone[-1][1]["row_outliers"] == pytest.approx(
            adahop(x[:, :33].double().numpy().var(1, ddof=1), 33)
        )
    batches, found = Batches(), [([], []) for _ in samples]
    for (tensor, operand), x, q in zip(found, samples, rounded, strict=True):
        batches.add_tensor(tensor, x, q, 33)
        batches.add_operand(operand, x, q, 33)
    assert not any(tensor or operand for tensor, operand in found)
    batches.flush()
    for ours, expected in zip(found, alone, strict=True):
        assert [finished(each) for each in ours] == [pytest.approx(each, rel=1e-12) for each in expected]


def test_full_batches_do_not_wait(monkeypatch):
    monkeypatch.setattr("halo_train.metrics.batches.FULL", 2000)
    batches, found = Batches(), [[], [], []]
    for i, each in enumerate(found):
        batches.add_product([each], torch.randn(2, 20, 30, dtype=torch.float64, generator=generator(i)))
        assert [len(f) for f in found] == [[0, 0, 0], [1, 1, 0], [1, 1, 0]][i]
    batches.flush()
    assert [len(each) for each in found] == [1, 1, 1]


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain", "halo0_fp8", "halo1_int8"])
def test_operands_are_those_of_the_layer(recipe):
    """Bit for bit what quantize_operands makes, whole or some rows only."""
    x, w = (torch.randn(s, generator=generator(i)).bfloat16() for i, s in enumerate([(30, 72), (20, 72)]))
    d = torch.exp2(torch.randint(-3, 4, (72,), generator=generator()).float())
    config = RECIPES[recipe]
    op = quantize_operands(x, w, Equalizer.of(d) if config.equalize else None, config)
    for expected, a, factor in ((op.x, x, 1 / d), (op.w, w, d)):
        ours = round_operand(a, factor if config.equalize else None, config)
        assert torch.equal(ours.dequantize(), expected.dequantize())
    if config.scaling is Scaling.ROWWISE:
        rows = SampledRows(x[[3, 17]], w[[8, 0, 19]], Equalizer.of(d))
        ours, parts = rows.rounded(config).dequantize(), rows.parts()
        assert torch.equal(ours[parts["x"]], op.x.dequantize()[[3, 17]])
        assert torch.equal(ours[parts["w"]], op.w.dequantize()[[8, 0, 19]])


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
        unrotated = Unrotated(WholeTensor.of(x), dtype)
        for scaling in Scaling:
            whole = quantize(x, fmt, scaling=scaling).dequantize()
            for ours, expected in (
                (unrotated.columns(x[:, columns], Format(fmt), scaling), whole[:, columns]),
                (unrotated.rows(x[rows], Format(fmt), scaling), whole[rows]),
            ):
                assert ours.scale.shape == expected.shape[:1]
                assert torch.equal(ours.dequantize().nan_to_num(7), expected.nan_to_num(7))
