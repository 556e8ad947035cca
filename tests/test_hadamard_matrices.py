"""Hadamard matrices of orders m that are no power of two."""

from __future__ import annotations

import pytest
import torch

from halo_train.hadamard_matrices import ORDERS, hadamard_matrix


@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_signs(order):
    h = hadamard_matrix(order)
    assert h.shape == (order, order)
    assert h.dtype is torch.int8
    assert set(h.unique().tolist()) == {-1, 1}
    exact = h.to(torch.int64)
    assert torch.equal(exact @ exact.t(), order * torch.eye(order, dtype=torch.int64))
    assert torch.equal(exact.t() @ exact, order * torch.eye(order, dtype=torch.int64))


def test_the_orders_of_the_design():
    assert ORDERS == (12, 20, 28, 36, 40, 44, 52, 60, 100, 108, 140, 156, 172)


def test_same_matrix_every_time():
    first = hadamard_matrix(172).clone()
    hadamard_matrix.cache_clear()
    assert torch.equal(hadamard_matrix(172), first)


@pytest.mark.parametrize(("order", "nearest"), [(92, 100), (1, 12), (16, 12), (1000, 172)])
def test_other_orders_are_refused(order, nearest):
    with pytest.raises(ValueError, match=f"got {order}; the nearest is {nearest}"):
        hadamard_matrix(order)
