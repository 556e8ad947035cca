"""Vectors that are kept from call to call, and where nothing may be kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halo_train import HaloLinear
from halo_train.reuse import KeptEqualizer, keeping_stream, ones


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_ones_are_made_once_for_a_length_and_dtype():
    like = torch.empty(0)
    kept = ones(24, like)
    assert torch.equal(kept, torch.ones(24))
    assert ones(24, like) is kept
    assert ones(24, like.double()).dtype is torch.float64
    assert len(ones(25, like)) == 25


@pytest.mark.parametrize("context", [Mode, torch.inference_mode])
def test_nothing_is_kept_where_it_must_not(context):
    kept, factors, exponent = ones(24, torch.empty(0)), KeptEqualizer(), torch.zeros(8, dtype=torch.int8)
    first = factors.get(exponent, keeping_stream(exponent))
    with context():
        assert ones(24, torch.empty(0)) is not kept
        assert factors.get(exponent, keeping_stream(exponent)) is not first
    assert factors.get(exponent, keeping_stream(exponent)) is first


def test_factors_are_made_again_when_the_exponents_change():
    factors, exponent = KeptEqualizer(), torch.arange(-4, 4, dtype=torch.int8)
    first = factors.get(exponent, keeping_stream(exponent))
    assert torch.equal(first.d, torch.exp2(exponent.float()))
    assert factors.get(exponent, keeping_stream(exponent)) is first
    exponent.add_(1)
    assert torch.equal(factors.get(exponent, keeping_stream(exponent)).inverse, torch.exp2(-exponent.float()))
    exponent.data = exponent.data + 1
    assert torch.equal(factors.get(exponent, keeping_stream(exponent)).d, torch.exp2(exponent.float()))


def test_in_a_process_group_only_those_of_sharded_layers_are_kept(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    factors, exponent = KeptEqualizer(), torch.zeros(8, dtype=torch.int8)
    stream = keeping_stream(exponent)
    assert factors.get(exponent, stream) is not factors.get(exponent, stream)
    assert factors.get(exponent, stream, sharded=True) is factors.get(exponent, stream, sharded=True)


def test_copies_and_pickles_start_empty():
    layer = HaloLinear(16, 16)
    layer(torch.randn(4, 16))
    assert layer._kept_equalizer._made
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin._kept_equalizer._made
    assert "_kept_equalizer" not in vars(layer.to_linear())
