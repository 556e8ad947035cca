"""The checks of test_fsdp.py, test_fsdp_around.py and test_fsdp_fused.py on GPUs, with NCCL.

All in one process group: to start processes that have CUDA and NCCL takes longer than the checks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_fsdp
import test_fsdp_around
import test_fsdp_fused
from fsdp_fixtures import run_on_ranks

ALONE = [*test_fsdp.CHECKS, *test_fsdp_around.CHECKS]


@pytest.mark.gpu
def test_one_gpu(tmp_path: Path) -> None:
    run_on_ranks(ALONE, 1, "cuda", tmp_path)


@pytest.mark.parametrize("world", [pytest.param(n, marks=pytest.mark.multi_gpu(n)) for n in (2, 4)])
def test_several_gpus(world: int, tmp_path: Path) -> None:
    run_on_ranks([*ALONE, *test_fsdp_fused.CHECKS], world, "cuda", tmp_path)
