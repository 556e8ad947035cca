"""Markers gpu and multi_gpu: skipped without the hardware, failed instead under --require-gpu."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from halo_train import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail tests marked gpu or multi_gpu instead of skipping them",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long ones first: with several workers the last to start decides when all are done.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = 1 if item.get_closest_marker("gpu") else 0
    for marker in item.iter_markers("multi_gpu"):  # multi_gpu(4) needs four
        wanted = max(wanted, *(marker.args or (2,)))
    if not wanted:
        return
    reason = ""
    if torch.cuda.device_count() < wanted:
        reason = f"needs {wanted} CUDA GPU(s), found {torch.cuda.device_count()}"
    elif not ops.kernel_status()["loaded"]:
        reason = f"the CUDA kernels are not available: {ops.kernel_status()['reason']}"
    if reason and item.config.getoption("--require-gpu"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run():
    """A bound that one draw in a thousand misses would fail a build a week."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_code_runs_compiled_afterwards() -> Iterator[None]:
    """QuantMetrics that is not closed leaves torch.compile off; the test that forgot it fails, not those that follow."""
    yield
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and (left := frames._stance.stance) != "default":
        torch.compiler.set_stance("default")
        pytest.fail(f"torch.compile is left with stance {left!r}; close() every QuantMetrics")
