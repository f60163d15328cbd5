"""Attention of rows that go on from another's beginning equals that of whole rows, both ways."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels.attention import Attention
from veneer.kernels.packing import Packing
from veneer.kernels.shared_packing import packing_of

# Of each row: of how many tokens of the last whole one it is given the keys, as far as that has so
# many, and its own tokens. A row that is given none is a whole one.
ROW = st.tuples(st.integers(0, 40), st.integers(1, 50))


@settings(max_examples=25)
@given(
    rows=st.lists(ROW, min_size=1, max_size=7),
    window=st.none() | st.integers(1, 20),
    softcap=st.sampled_from([None, 0.7]),
    has_sinks=st.booleans(),
    way=st.sampled_from(["composed", "all heads", "each head"]),
)
def test_attention_behind_anothers_beginning_equals_the_whole(
    rows, window, softcap, has_sinks, way
):
    torch.manual_seed(sum(map(sum, rows)))
    lengths, before, whole, places = [], [], [], []
    beginning = longest = 0  # of the last whole row
    for wished, own in rows:
        count = min(wished, longest)
        first = sum(lengths)
        if not count:
            beginning, longest = first, own
        lengths.append(own)
        before.append(count)
        whole.append(count + own)
        places += [*range(beginning, beginning + count), *range(first, first + own)]
    is_own = torch.ones(sum(whole), dtype=torch.bool)
    for number, (start, _) in enumerate(pairwise(accumulate(whole, initial=0))):
        is_own[start : start + before[number]] = False
    shapes = [(4, 3), (2, 3), (2, 5), (4, 5)]
    q, k, v, dy = (torch.randn(sum(lengths), *shape, dtype=torch.float64) for shape in shapes)
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None

    def results(packing, q, k, v, dy):
        attention = Attention(packing, 0.4, window, softcap, sinks)
        if way == "composed":
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = attention.composed(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)
        y, log_sums = attention.forward(q, k, v)
        return y, *attention.backward(dy, q, k, v, y, log_sums)

    places = torch.tensor(places)
    no_gradient = ~is_own[:, None, None]  # of the second time that a beginning is in the whole rows
    y, dq, dk, dv = results(
        *(Packing(whole), *(x[places] for x in (q, k, v))), dy[places].masked_fill(no_gradient, 0)
    )
    sums = [torch.zeros_like(x).index_add(0, places, d) for x, d in ((q, dq), (k, dk), (v, dv))]
    packing = packing_of(lengths, before)
    if way == "each head":
        packing.key_heads_at_once = lambda k, v: 1
    ours = results(packing, q, k, v, dy)
    torch.testing.assert_close(list(ours), [y[is_own], *sums])


def test_many_answers_to_a_long_prompt_are_given_its_keys_head_by_head():
    k = torch.empty(1, 8, 128, device="meta")
    pair = packing_of([2000, 50], [0, 1999])
    assert pair.key_heads_at_once(k, k) == 8
    group = packing_of([2000, *[9] * 63], [0, *[1999] * 63])
    assert group.key_heads_at_once(k, k) == 1
