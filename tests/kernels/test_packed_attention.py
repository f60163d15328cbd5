"""Attention over packed rows equals that of each row alone, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support.dense_attention import dense_attention
from veneer.kernels.attention import Attention, UnsupportedAttention, packed_attention
from veneer.kernels.packing import Packing

DOUBLE = {"dtype": torch.float64}


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 9),
    softcap=st.sampled_from([None, 0.7]),
    has_sinks=st.booleans(),
    value_dim=st.sampled_from([3, 2, 5]),
    scaling=st.sampled_from([None, 0.2]),
    composed=st.booleans(),
)
def test_packed_attention_equals_each_sequence_alone(
    lengths, heads, window, softcap, has_sinks, value_dim, scaling, composed
):
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(1, n, tokens, dim, **DOUBLE, requires_grad=True)
        for n, dim in ((heads[0], 3), (heads[1], 3), (heads[1], value_dim))
    )
    sinks = torch.randn(heads[0], **DOUBLE) if has_sinks else None
    packing = Packing(lengths)
    if composed:
        attention = Attention(packing, scaling or 3**-0.5, window, softcap, sinks)
        y = attention.composed(*(x[0].transpose(0, 1) for x in (q, k, v)))[None]
    else:
        y, _ = packed_attention(
            *(nn.Identity(), q, k, v, None),
            packing=packing,
            sliding_window=window,
            scaling=scaling,
            softcap=softcap,
            s_aux=sinks,
        )
    scale = 3**-0.5 if scaling is None else scaling
    sequences = zip(*(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    expected = [dense_attention(*qkv, scale, window, softcap, sinks) for qkv in sequences]
    expected = torch.cat(expected)[None]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"packing": None},
        {"attention_mask": torch.ones(1, 1, 4, 4)},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(2, requires_grad=True)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_packed_attention_refuses_what_it_does_not_do(options):
    x = torch.randn(1, 2, 4, 3)
    options = {"attention_mask": None, "packing": Packing([4])} | options
    with pytest.raises(UnsupportedAttention):
        packed_attention(nn.Identity(), x, x, x, **options)


def test_short_sequences_share_their_products():
    assert Packing(list(range(1, 49))).groups == [(16, 48), (16, 32), (16, 16)]
    assert Packing([1000, 760, 750]).groups == [(2, 1008), (1, 752)]
