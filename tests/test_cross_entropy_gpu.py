"""The kernel of the loss against float64, and the loss of a model with it against the same without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halo_train.training import cross_entropy
from halo_train.training.cross_entropy import LogitMap, loss_and_slope, runs_kernel
from halo_train.training.loss import LinearCrossEntropy

pytestmark = pytest.mark.gpu
MAPS = [LogitMap(), LogitMap(0.25), LogitMap(1.5, 3.0)]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("size", [1, 5, 300, 8192, 20001, 151936])
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2e-6)]
)
def test_losses_and_slopes(dtype: torch.dtype, unit: float, size: int, logit_map: LogitMap) -> None:
    generator = torch.Generator("cuda").manual_seed(size)
    z = (4 * torch.randn(37, size, device="cuda", generator=generator)).to(dtype)
    z[3] = 1000  # all equal, and far beyond what exp can hold
    z[4, size // 2] = 3e4
    targets = torch.randint(size, (37,), device="cuda", generator=generator)
    targets[:2] = torch.tensor([0, size - 1])
    exact = z.double().requires_grad_()
    losses = F.cross_entropy(logit_map(exact), targets, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), exact)

    assert runs_kernel(z)
    alone = z.clone()
    loss, none = loss_and_slope(alone, targets, logit_map, needs_slope=False)
    assert none is None
    assert torch.equal(alone, z)
    both, found = loss_and_slope(z, targets, logit_map, needs_slope=True)
    assert found.data_ptr() == z.data_ptr()
    assert loss.item() == both.item()
    torch.testing.assert_close(both.double(), losses.sum(), rtol=1e-5, atol=1e-4)
    # Half a unit in the last place of each slope, and the float32 of its steps.
    bound = unit * slope.abs() + 2e-6 * logit_map.scale
    assert ((found.double() - slope).abs() <= bound).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    z = torch.zeros(2, 10000, device="cuda", dtype=torch.bfloat16)
    z[1, 9999] = value
    loss, _ = loss_and_slope(
        z, torch.zeros(2, dtype=torch.int64, device="cuda"), LogitMap(), needs_slope=True
    )
    assert not loss.isfinite()


def test_of_more_elements_than_an_int32_counts() -> None:
    rows, size = 20000, 128256
    z = torch.zeros(rows, size, device="cuda", dtype=torch.bfloat16)
    z[-1, -1] = 20
    targets = torch.full((rows,), size - 1, device="cuda")
    last = F.cross_entropy(z[-1:].double(), targets[-1:]).item()
    loss, slope = loss_and_slope(z, targets, LogitMap(), needs_slope=True)
    expected = (rows - 1) * torch.tensor(float(size)).log().item() + last
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert slope[-2, -1].item() == -1
    assert slope[-1, -1].item() == pytest.approx(-last, rel=0.02)


def test_gradients_are_those_of_the_operators_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        h = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(5003, 256, device="cuda", requires_grad=True)
        bias = torch.randn(5003, device="cuda", requires_grad=True)
        targets = torch.randint(5003, (300,), device="cuda")
        loss = LinearCrossEntropy.apply(h, weight, bias, targets, LogitMap(0.1), 128)
        loss.backward()
        return [loss.detach(), h.grad, weight.grad, bias.grad]

    fused = gradients()
    monkeypatch.setattr(cross_entropy, "runs_kernel", lambda z: False)
    for ours, theirs in zip(fused, gradients(), strict=True):
        assert (ours.double() - theirs.double()).norm() <= 3e-3 * theirs.double().norm()
