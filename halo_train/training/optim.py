"""AdamW for float32 and for bfloat16 weights, with moments in float32 or 8 bits, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from .config import TrainSection
from .errors import UserError

BETAS = (0.9, 0.95)
EPS = 1e-8

_SLICE = 1 << 26
"""Elements of a weight that are updated at a time: 0.25 GiB for each float32 copy."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments whose bfloat16 weights are rounded up or down at random, right on average.

    Rounded to nearest, an update smaller than 1/256 of a weight would be lost, which at a fine-tuning learning rate is
    nearly every one. Weights of another dtype are updated as by :class:`torch.optim.AdamW`. The random numbers are
    those of the device's default generator.

    Args:
        params: parameters or groups of them; lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but the moments stay float32; there they would take the dtype of the weights."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True):
            if key in saved:
                self.state[p] = {name: value.to(p.device) for name, value in saved[key].items()}

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        assert p.grad is not None
        flat = [_local(t).view(-1) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        flat.append(_local(p.grad).reshape(-1))
        step = state["step"].clone()
        for weight, first, second, grad in zip(*(t.split(_SLICE) for t in flat), strict=True):
            exact = weight.float()
            state["step"].copy_(step)
            adamw(
                [exact], [grad.float()], [first], [second], [], [state["step"]], fused=True, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                weight_decay=group["weight_decay"], maximize=False,
            )  # fmt: skip
            if weight.dtype == torch.bfloat16:
                weight.copy_(round_stochastically(exact))


def round_stochastically(x: Tensor) -> Tensor:
    """Float32 values that bfloat16 holds exactly: of the two neighbours of each the nearer is the likelier, so that the mean is x.

    Infinities stay; bfloat16 is the upper half of a float32, so random lower bits carry into it with the right frequency.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32)


def build_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """The optimizer of ``train.optimizer`` over the parameters that need a gradient; no weight decay on norms and biases.

    bfloat16 weights are rounded stochastically.

    Raises:
        UserError: 8-bit moments without torchao.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ModuleNotFoundError:
            raise UserError(
                "train.optimizer=adamw_8bit needs torchao: pip install 'halo_train[torchao]'"
            ) from None
        return AdamW8bit(groups, lr=train.lr, betas=BETAS, eps=EPS, bf16_stochastic_round=True)
    if any(p.dtype == torch.bfloat16 for p in parameters):
        return StochasticAdamW(groups, lr=train.lr)
    return torch.optim.AdamW(groups, lr=train.lr, betas=BETAS, eps=EPS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For all parameters; torchao keeps it in a tensor, which its compiled update reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(step: int, steps: int, train: TrainSection) -> float:
    """Of optimiser step ``step`` (the first is 1) of ``steps``: linear warm-up to ``train.lr``, then as train.schedule says."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    done = (step - 1 - train.warmup_steps) / (steps - train.warmup_steps)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return train.lr * left[train.schedule]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
