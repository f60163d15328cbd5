"""Attention over packed rows equals that of each row alone, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels.attention import Packing, UnsupportedAttention, packed_attention

DOUBLE = {"dtype": torch.float64}


def alone(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scaling: float | None
) -> Tensor:  # all (heads, tokens, head_dim)
    share = q.shape[0] // k.shape[0]
    at = torch.arange(q.shape[1])
    back = at[:, None] - at[None, :]
    mask = (back >= 0) & (back < (window or len(at) + 1))
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)
    return y[0].transpose(0, 1)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 9),
    scaling=st.sampled_from([None, 0.2]),
)
def test_packed_attention_equals_each_sequence_alone(lengths, heads, window, scaling):
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(1, n, tokens, 3, **DOUBLE, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    y, _ = packed_attention(
        nn.Identity(),
        q,
        k,
        v,
        None,
        packing=Packing(lengths),
        sliding_window=window,
        scaling=scaling,
    )
    sequences = zip(*(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    expected = torch.cat([alone(*qkv, window, scaling) for qkv in sequences])[None]
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
        {"softcap": 30.0},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_packed_attention_refuses_what_it_does_not_do(options):
    x = torch.randn(1, 2, 4, 3)
    options = {"attention_mask": None, "packing": Packing([4])} | options
    with pytest.raises(UnsupportedAttention):
        packed_attention(nn.Identity(), x, x, x, **options)
