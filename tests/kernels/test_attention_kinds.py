"""Windows, soft caps, sinks and values of another dim: how near, and in how much memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)

from support.closeness import assert_no_further
from support.dense_attention import dense_attention
from veneer.kernels import score_blocks
from veneer.kernels.attention import Attention
from veneer.kernels.packing import Packing

KINDS = list(itertools.product([None, 37], [None, 2.5], [False, True], [None, 16]))


def leaves_of(lengths: list[int], value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k and v whose keys share an offset, as biases give it them."""
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, n, dim) for n, dim in ((6, 24), (2, 24), (2, value_dim)))
    return [x.to(dtype).requires_grad_() for x in (q, k + 2 * torch.randn(24), v)]


def with_gradients(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def ours(attention: Attention, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    q, k, v = (x.detach() for x in leaves)
    y, log_sums = attention.forward(q, k, v)
    return [y, *attention.backward(dy, q, k, v, y, log_sums)]


def transformers_own(attention: Attention, leaves: list[Tensor]) -> Tensor:
    """Return y by the eager attention of gpt-oss or Gemma 2, with a mask over the whole batch."""
    lengths = attention.packing.lengths
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(row))
    distance = at[:, None] - at
    visible = (row[:, None] == row) & (distance >= 0)
    visible &= distance < (attention.window or len(row))
    dtype = leaves[0].dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    if attention.sinks is None:
        y, _ = gemma2_attention(
            module, q, k, v, mask[None, None], scaling=attention.scale, softcap=attention.softcap
        )
    else:
        module.sinks = attention.sinks
        y, _ = gpt_oss_attention(module, q, k, v, mask[None, None], attention.scale)
    return y[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("window", "softcap", "has_sinks", "value_dim"), KINDS)
@pytest.mark.thinned(pairs=True)
def test_no_further_from_float64_than_transformers(
    window, softcap, has_sinks, value_dim, dtype, monkeypatch
):
    torch.manual_seed(0)
    lengths = [28, 262, 25, 11]  # of one block of queries, two in a group, and of two blocks
    sinks = torch.randn(6).to(dtype) if has_sinks else None
    attention = Attention(Packing(lengths), 0.3, window, softcap, sinks)
    leaves = leaves_of(lengths, value_dim or 24, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    sequences = zip(*(x.transpose(0, 1).split(lengths, 1) for x in wide), strict=True)
    wide_sinks = None if sinks is None else sinks.double()
    y = torch.cat([dense_attention(*x, 0.3, window, softcap, wide_sinks) for x in sequences])
    dy = torch.randn_like(y).to(dtype)
    exact = with_gradients(y, wide, dy)
    composed = with_gradients(attention.composed(*leaves), leaves, dy)
    if softcap is not None and has_sinks:  # no model of transformers has both
        peer = composed
    else:
        peer = with_gradients(transformers_own(attention, leaves), leaves, dy)
    names = ("y", "dq", "dk", "dv")
    for in_blocks in (True, False) if softcap is None else (True,):  # caps are always in blocks
        monkeypatch.setattr("veneer.kernels.attention.prefers_blocks", lambda _, b=in_blocks: b)
        for results in zip(ours(attention, leaves, dy), peer, exact, names, strict=True):
            assert_no_further(*results)
    for results in zip(composed, peer, exact, names, strict=True):
        assert_no_further(*results)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("without_compiler", [False, True])
@pytest.mark.parametrize(("window", "softcap", "has_sinks", "value_dim"), KINDS)
@pytest.mark.thinned(pairs=True)
def test_memory_grows_with_the_length(
    window, softcap, has_sinks, value_dim, without_compiler, monkeypatch
):
    monkeypatch.setattr(score_blocks, "SCORES_AT_ONCE", 2**14)
    monkeypatch.setattr(score_blocks, "QUERY_BLOCK", 64)
    monkeypatch.setattr("veneer.kernels.attention.QUERY_BLOCK", 64)
    if without_compiler:
        monkeypatch.setattr(score_blocks, "kernel", lambda name, like: None)
    sinks = torch.zeros(6) if has_sinks else None
    largest = []
    for length in (512, 1024):
        attention = Attention(Packing([length]), 0.3, window, softcap, sinks)
        leaves = leaves_of([length], value_dim or 24, torch.float32)
        dy = torch.zeros(length, 6, value_dim or 24)
        with LargestTensor() as seen:
            ours(attention, leaves, dy)
        largest.append(seen.numbers)
    assert largest[1] <= 2 * largest[0] < 512 * 512


@pytest.mark.parametrize("has_prefix", [False, True])
def test_a_window_by_torchs_operations_needs_no_square_mask(has_prefix, monkeypatch):
    monkeypatch.setattr("veneer.kernels.attention.COMPOSED_BLOCK", 64)
    attention = Attention(Packing([1024]), 0.3, 50)
    leaves = leaves_of([1024], 24, torch.float32)
    prefix = torch.randn(2, 2, 5, 24) if has_prefix else None
    with LargestTensor() as seen, torch.no_grad():
        attention.composed(*leaves, prefix=prefix)
    assert seen.numbers < 1024 * 1024 / 4


@pytest.mark.parametrize(("window", "softcap", "has_sinks", "value_dim"), KINDS)
def test_a_prefix_is_what_longer_sequences_begin_with(
    window, softcap, has_sinks, value_dim, monkeypatch
):
    monkeypatch.setattr("veneer.kernels.attention.COMPOSED_BLOCK", 16)  # several in these rows
    torch.manual_seed(0)
    lengths, virtual = [50, 33], 4
    sinks = torch.randn(6, dtype=torch.float64) if has_sinks else None
    q, k, v = (x.detach() for x in leaves_of(lengths, 24, torch.float64))
    prefix = torch.randn(2, 2, virtual, 24, dtype=torch.float64)
    attention = Attention(Packing(lengths), 0.3, window, softcap, sinks)
    y = attention.composed(q, k, v, prefix=prefix)
    for row in zip(*(x.split(lengths) for x in (q, k, v, y)), strict=True):
        longer = [nn.functional.pad(row[0].transpose(0, 1), (0, 0, virtual, 0))]
        longer += [
            torch.cat([x, own.transpose(0, 1)], 1) for x, own in zip(prefix, row[1:3], strict=True)
        ]
        expected = dense_attention(*longer, 0.3, window, softcap, sinks)[virtual:]
        torch.testing.assert_close(row[3], expected)
