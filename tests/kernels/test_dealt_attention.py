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
    """One of the processes of a group whose others are not there: their keys and values are given,
    (all tokens, key heads, dim), and the gradients of all are noted."""

    rank: int
    size: int
    least: int
    k: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))
    heads: slice = field(default_factory=lambda: slice(None))  # that were gathered last

    def joined(self, heads: slice) -> Tensor:
        return torch.cat([x[:, heads].flatten(1) for x in (self.k, self.v)], 1)

    def gather(self, x: Tensor) -> Tensor:
        for heads in (slice(None), slice(0, 1), slice(1, 2)):
            every = self.joined(heads)
            if torch.equal(every.unflatten(0, (self.size, -1))[self.rank], x):
                self.heads = heads
                return every
        raise AssertionError("these are no own keys and values")

    def own_sum(self, x: Tensor) -> Tensor:
        dk, dv = (torch.zeros_like(every) for every in (self.k, self.v))
        own = x.split([each[:, self.heads][0].numel() for each in (dk, dv)], 1)
        for each, gradient in zip((dk, dv), own, strict=True):
            each[:, self.heads] = gradient.view_as(each[:, self.heads])
        self.sent = [a + b for a, b in zip(self.sent, (dk, dv), strict=True)]
        return x.unflatten(0, (self.size, -1))[self.rank]

    def forget(self) -> None:
        self.sent = [torch.zeros_like(every) for every in (self.k, self.v)]


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
    way=st.sampled_from(["all heads", "each head", "composed"]),
)
def test_dealt_attention_equals_the_whole(lengths, size, least, window, softcap, has_sinks, way):
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
    results, sent = [], []
    for group, packing in zip(groups, packings, strict=True):
        group.k, group.v = k[order], v[order]
        group.forget()
        attention = Attention(packing, 0.4, window, softcap, sinks)
        own = [x[packing.own] for x in (q, k, v)]
        if way == "composed":
            leaves = [x.requires_grad_() for x in (own[0], group.k, group.v)]
            y = attention.composed(*own)
            dq, *sums = torch.autograd.grad(y, leaves, dy[packing.own])
        else:
            at_once = 1 if way == "each head" else 2
            packing.key_heads_at_once = lambda k, v, at_once=at_once: min(at_once, k.shape[1])
            y, log_sums = attention.forward(*own)
            dq, _, _ = attention.backward(dy[packing.own], *own, y, log_sums)
            sums = group.sent
        results.append((y.detach(), dq))
        sent.append(sums)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens))
    y, dq = (torch.cat(of_all)[back] for of_all in zip(*results, strict=True))
    dk, dv = (sum(of_all)[back] for of_all in zip(*sent, strict=True))
    torch.testing.assert_close([y, dq, dk, dv], expected)
