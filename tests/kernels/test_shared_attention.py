"""Attention of rows that go on from the row before them equals that of whole rows, both ways."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels.attention import Attention
from veneer.kernels.packing import Packing
from veneer.kernels.shared_packing import packing_of

PAIR = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=25)
@given(
    pairs=st.lists(PAIR, min_size=1, max_size=4),
    window=st.none() | st.integers(1, 20),
    softcap=st.sampled_from([None, 0.7]),
    has_sinks=st.booleans(),
    composed=st.booleans(),
)
def test_attention_behind_anothers_beginning_equals_the_whole(
    pairs, window, softcap, has_sinks, composed
):
    torch.manual_seed(sum(map(sum, pairs)))
    lengths, before, whole, places = [], [], [], []
    for prompt, one, other in pairs:
        first = sum(lengths)
        lengths += [prompt + one, other]
        before += [0, prompt]
        whole += [prompt + one, prompt + other]
        second = first + prompt + one
        places += [*range(first, second), *range(first, first + prompt)]
        places += range(second, second + other)
    is_own = torch.ones(sum(whole), dtype=torch.bool)
    for number, (start, _) in enumerate(pairwise(accumulate(whole, initial=0))):
        is_own[start : start + before[number]] = False
    shapes = [(4, 3), (2, 3), (2, 5), (4, 5)]
    q, k, v, dy = (torch.randn(sum(lengths), *shape, dtype=torch.float64) for shape in shapes)
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None

    def results(packing, q, k, v, dy):
        attention = Attention(packing, 0.4, window, softcap, sinks)
        if composed:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = attention.composed(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)
        y, log_sums = attention.forward(q, k, v)
        return y, *attention.backward(dy, q, k, v, y, log_sums)

    places = torch.tensor(places)
    no_gradient = ~is_own[:, None, None]  # of the second time that a prompt is in the whole rows
    y, dq, dk, dv = results(
        *(Packing(whole), *(x[places] for x in (q, k, v))), dy[places].masked_fill(no_gradient, 0)
    )
    sums = [torch.zeros_like(x).index_add(0, places, d) for x, d in ((q, dq), (k, dk), (v, dv))]
    ours = results(packing_of(lengths, before), q, k, v, dy)
    torch.testing.assert_close(list(ours), [y[is_own], *sums])
