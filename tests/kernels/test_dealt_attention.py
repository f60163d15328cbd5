"""Attention over dealt tokens equals that over the whole batch, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.kernels.attention import Attention
from veneer.kernels.dealt_packing import DealtPacking
from veneer.kernels.packing import Packing
from veneer.processes.context import deal

DOUBLE = {"dtype": torch.float64}


@dataclass
class Alone:
    """One of the processes of a group whose others are not there: what they would send is given."""

    rank: int
    size: int
    least: int = 1
    every: Tensor | None = None
    sent: list[Tensor] = field(default_factory=list)

    def gather(self, x: Tensor) -> Tensor:
        assert self.every is not None
        own = self.every.unflatten(0, (self.size, -1))[self.rank]
        assert torch.equal(own, x)
        return self.every

    def own_sum(self, x: Tensor) -> Tensor:
        self.sent.append(x)
        return x.unflatten(0, (self.size, -1))[self.rank]


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    size=st.integers(2, 5),
    long=st.integers(1, 70),
)
def test_every_token_is_dealt_once_and_all_get_as_many(lengths, size, long):
    lengths = [*lengths, -sum(lengths) % size or size]
    dealt = deal(lengths, size, long=long)
    tokens = [[(p.row, i) for p in pieces for i in range(p.start, p.stop)] for pieces in dealt]
    assert {len(own) for own in tokens} == {sum(lengths) // size}
    every = [(row, i) for row, length in enumerate(lengths) for i in range(length)]
    assert sorted(itertools.chain(*tokens)) == every
    for pieces, (row, length) in itertools.product(dealt, enumerate(lengths)):
        assert sum(p.row == row for p in pieces) <= (2 if length >= long else 1)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_keys_that_a_long_rows_queries_see_are_dealt_evenly(size):
    keys = [
        sum(sum(range(piece.start + 1, piece.stop + 1)) for piece in pieces)
        for pieces in deal([4096, 4096 - 3, 3], size, long=1024)
    ]
    assert max(keys) < 1.01 * min(keys)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    size=st.integers(2, 4),
    least=st.sampled_from([2, 5, 64]),
    window=st.none() | st.integers(1, 9),
    softcap=st.sampled_from([None, 0.7]),
    has_sinks=st.booleans(),
    composed=st.booleans(),
)
def test_dealt_attention_equals_the_whole(
    lengths, size, least, window, softcap, has_sinks, composed
):
    torch.manual_seed(sum(lengths))
    lengths = [*lengths, -sum(lengths) % size or size]
    tokens = sum(lengths)
    q, k, v, dy = (
        torch.randn(tokens, n, dim, **DOUBLE) for n, dim in [(4, 3), (2, 3), (2, 5), (4, 5)]
    )
    sinks = torch.randn(4, **DOUBLE) if has_sinks else None
    whole = Attention(Packing(lengths), 0.4, window, softcap, sinks)
    y, log_sums = whole.forward(q, k, v)
    expected = [y, *whole.backward(dy, q, k, v, y, log_sums)]
    groups = [Alone(rank, size, least) for rank in range(size)]
    packings = [DealtPacking(lengths, group, highest=0) for group in groups]
    order = torch.cat([packing.own for packing in packings])
    every = torch.cat([k.flatten(1), v.flatten(1)], 1)[order]
    results, sent = [], []
    for group, packing in zip(groups, packings, strict=True):
        group.every = every
        attention = Attention(packing, 0.4, window, softcap, sinks)
        own = [x[packing.own] for x in (q, k, v)]
        if composed:
            leaves = [x.requires_grad_() for x in (own[0], every.clone())]
            group.gather = lambda _, every=leaves[1]: every
            y = attention.composed(*own)
            dq, d_every = torch.autograd.grad(y, leaves, dy[packing.own])
        else:
            y, log_sums = attention.forward(*own)
            dq, _, _ = attention.backward(dy[packing.own], *own, y, log_sums)
            (d_every,) = group.sent
        results.append((y.detach(), dq))
        sent.append(d_every)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens))
    y, dq = (torch.cat(of_all)[back] for of_all in zip(*results, strict=True))
    dk, dv = sum(sent)[back].split([6, 10], 1)
    torch.testing.assert_close([y, dq, dk.view(k.shape), dv.view(v.shape)], expected)
