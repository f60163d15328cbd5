"""Padded rows in passes of rows of like length: law 7, for models that take no packed rows."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.plain import own_loss
from support.random_adapters import examples, shake
from support.tiny_models import tiny
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.fused.padding import runs_of

ROWS = examples([24, 5, 23, 6, 17, 2])


def padded_tokens(runs, cost):
    return sum(len(run) * max(run) + cost for run in runs)


@pytest.mark.parametrize("cost", [0, 1, 5, 30, math.inf])
def test_no_other_runs_have_less_padding(cost):
    lengths = [9, 8, 8, 2, 7, 1, 1]
    runs = runs_of(lengths, cost)
    assert list(itertools.chain(*runs)) == lengths
    cuts = itertools.product([True, False], repeat=len(lengths) - 1)
    if cost == math.inf:
        assert runs == [lengths]
        return
    for chosen in cuts:
        ends = [i for i, cut in enumerate(chosen, 1) if cut]
        pairs = itertools.pairwise([0, *ends, len(lengths)])
        other = [lengths[start:end] for start, end in pairs]
        assert padded_tokens(runs, cost) <= padded_tokens(other, cost)


@pytest.mark.parametrize("architecture", ["mamba2", "falcon_h1"])
def test_passes_of_like_length_equal_one(architecture):
    model = tiny(architecture)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    chosen, _ = choose_forward(model, ROWS)
    assert not chosen.packed
    assert chosen.pass_tokens < math.inf

    def gradients(loss):
        trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    calls = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    ways = [(replace(chosen, pass_tokens=cost), cost) for cost in (4.0, math.inf)]
    orders = range(len(ROWS)), range(len(ROWS))[::-1]
    losses = [way(model, pack(ROWS, order)) for way, _ in ways for order in orders]
    assert len(calls) > len(losses)
    ours = [gradients(loss) for loss in losses]
    peer = own_loss(model, ROWS)
    peers = gradients(peer)
    exact = own_loss(model.double(), ROWS)
    exactly = gradients(exact)
    for loss, own in zip(losses, ours, strict=True):
        assert_no_further(loss, peer, exact, "the loss")
        assert_gradients_no_further(own, peers, exactly)
