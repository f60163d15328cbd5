"""Quantized weights: codes, scales and values are bitsandbytes' own, bit for bit."""

import copy

import bitsandbytes as bnb
import bitsandbytes.functional as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from support.closeness import assert_no_further
from veneer.quant import nf4
from veneer.quant import weight as quant_weight
from veneer.quant.int8 import Int8
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear, product, product_back

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows shorter than a block, rows that share one, odd rows, odd everything, many blocks of scales.
SHAPES = [(1, 1), (1, 2), (2, 1), (48, 32), (7, 9), (5, 66), (3, 65), (1024, 100), (130, 192)]


def drawn(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * scale).to(dtype)


def theirs(weight: Tensor) -> tuple[Tensor, bnb.functional.QuantState]:
    return reference.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def by_definition(codes: Tensor, state: bnb.functional.QuantState, dtype: torch.dtype) -> Tensor:
    """Return table[code] · scale of each number's block: what bitsandbytes' kernels compute."""
    numbers = state.shape.numel()
    scales = state.absmax
    if state.nested:
        scales = reference.dequantize_blockwise(scales, state.state2) + state.offset
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[:numbers]
    values = state.code[nibbles.int()] * scales.repeat_interleave(state.blocksize)[:numbers]
    return values.view(state.shape).to(dtype)


@pytest.mark.parametrize("native", [True, False], ids=["native", "bitsandbytes"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_equals_bitsandbytes(shape, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(nf4, "kernel", lambda name, like: None)
    for scale in (0.02, 0.0, 300.0):
        weight = drawn(shape, dtype, scale=scale)
        codes, state = theirs(weight)
        ours = NF4.quantize(weight, dtype)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.state.absmax, state.absmax)
        assert torch.equal(ours.state.offset, state.offset)
        assert torch.equal(ours.state.state2.absmax, state.state2.absmax)
        assert torch.equal(ours.dequantize(), by_definition(codes, state, dtype))
        if shape[1] % 2 == 0 and shape[1] >= 64:  # else their kernel for CPUs is wrong
            assert torch.equal(ours.dequantize(), reference.dequantize_4bit(codes, state))


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**20), st.sampled_from(DTYPES[:2]))
def test_nf4_codes_of_any_shape(out, in_, seed, dtype):
    weight = drawn((out, in_), dtype, seed)
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
    ours = nf4._codes_and_absmax(weight)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_holds_what_float32_does(shape, quant_type):
    codes, state = reference.quantize_4bit(
        drawn(shape, torch.float32), compress_statistics=True, quant_type=quant_type
    )
    narrow, wide = (NF4(codes, state, dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(wide.dequantize(), narrow.dequantize().double())
    if quant_type == "nf4":
        ours = NF4.quantize(drawn(shape, torch.float32).double(), torch.float64)
        assert torch.equal(
            ours.codes, NF4.quantize(drawn(shape, torch.float32), torch.float32).codes
        )
        assert ours.dequantize().dtype == torch.float64


def test_ties_and_the_ends_of_the_table():
    table = reference.get_4bit_type("nf4", device="cpu")
    ends = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.tensor([1.0, -1.0])])
    weight = ends.repeat(64)[: 64 * 33].view(33, 64)
    assert torch.equal(NF4.quantize(weight, torch.float32).codes, theirs(weight)[0])


def test_the_bits_of_a_large_weight():
    weight = NF4.quantize(drawn((576, 576), torch.bfloat16), torch.bfloat16)
    assert weight.nbytes * 8 / weight.shape.numel() <= 4.13
    assert weight.nbytes == 576 * 576 // 2 + 576 * 9 + 4 * -(576 * 9 // -256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_bitsandbytes(shape, dtype):
    weight = drawn(shape, dtype)
    ours = Int8.quantize(weight, dtype)
    codes, absmax, _ = reference.int8_vectorwise_quant(weight.to(torch.float16))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    values = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(ours.dequantize(), values.to(dtype))


@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_comes_back(kind, shape):
    weight = kind.quantize(drawn(shape, torch.float32), torch.float32)
    again = kind.from_tensors(weight.tensors(), torch.float32)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.shape == weight.shape
    assert again.nbytes == weight.nbytes


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_all_kinds_that_others_store(quant_type, nested):
    weight = drawn((130, 192), torch.bfloat16)
    codes, state = reference.quantize_4bit(
        weight, blocksize=128, compress_statistics=nested, quant_type=quant_type
    )
    entries = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    ours = NF4.from_tensors({"weight": codes, **entries}, torch.bfloat16)
    assert torch.equal(ours.dequantize(), by_definition(codes, state, torch.bfloat16))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_multiplies_with_our_codes(quant_type, nested):
    """As a card does for few tokens; here its own formula computes."""
    codes, state = reference.quantize_4bit(
        drawn((130, 192), torch.float32),
        blocksize=64,
        compress_statistics=nested,
        quant_type=quant_type,
    )
    weight = NF4(codes, state, torch.float32)
    values, x = weight.dequantize(), drawn((5, 192), torch.float32, 1)
    exact = x.double() @ values.double().T
    assert_no_further(weight._product(x), x @ values.T, exact)
    if quant_type == "nf4" and nested:
        ours = NF4.quantize(drawn((130, 192), torch.float32), torch.float32)
        assert torch.equal(ours._product(x), weight._product(x))
    assert weight.product_of_few(x) is None  # on the CPU our own kernels are faster


@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("shape", [(1024, 100), (130, 192), (700, 64), (33, 7)])
def test_products_by_blocks_of_rows(kind, shape, monkeypatch):
    weight = kind.quantize(drawn(shape, torch.float32), torch.float32)
    values = weight.dequantize()
    x, dy = drawn((5, shape[1]), torch.float32, 1), drawn((5, shape[0]), torch.float32, 2)
    for numbers in (1, 2**12, 2**23):
        monkeypatch.setattr(quant_weight, "BLOCK_NUMBERS", numbers)
        blocks = list(weight.blocks())
        assert torch.equal(torch.cat([block for _, block in blocks]), values)
        assert all(values[rows].shape == block.shape for rows, block in blocks)
        y = product(x, weight, x.new_empty(5, shape[0]))
        assert_no_further(y, x @ values.T, x.double() @ values.double().T)
        assert_no_further(product_back(dy, weight), dy @ values, dy.double() @ values.double())


def test_blocks_of_a_product_are_added_up_without_rounding(monkeypatch):
    weight = NF4.quantize(drawn((4096, 128), torch.bfloat16), torch.bfloat16)
    dy = drawn((64, 4096), torch.bfloat16, 1, scale=1.0)
    exact = dy.double() @ weight.dequantize().double()
    errors = []
    for numbers in (2**23, 2**14):
        monkeypatch.setattr(quant_weight, "BLOCK_NUMBERS", numbers)
        errors.append(float((product_back(dy, weight).double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]  # the blocks' own rounding, beside that of the sum


@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_layer_equals_the_dense_one_with_its_values(kind, bias):
    weight = kind.quantize(drawn((12, 64), torch.float32), torch.float32)
    layer = QuantizedLinear(weight, nn.Linear(64, 12, bias=bias))
    dense = layer.to_dense()
    x = torch.randn(2, 3, 64)
    dy = torch.randn(2, 3, 12)

    def output_and_gradient(module, dtype):
        wide = x.detach().to(dtype).requires_grad_()
        y = module(wide)
        return y, torch.autograd.grad(y, wide, dy.to(dtype))[0]

    reference = output_and_gradient(copy.deepcopy(dense).double(), torch.float64)
    ours, peers = (output_and_gradient(module, torch.float32) for module in (layer, dense))
    for own, peer, exact in zip(ours, peers, reference, strict=True):
        assert_no_further(own, peer, exact)
    assert type(dense) is nn.Linear
    assert torch.equal(layer.weight, weight.dequantize())
    assert all(not p.requires_grad for p in layer.parameters())


def test_a_layer_for_conv1d_goes_back_to_one():
    own = Conv1D(12, 64)
    layer = QuantizedLinear(Int8.quantize(own.weight.T, torch.float32), own, transposed=True)
    x = torch.randn(3, 64)
    dense = layer.to_dense()
    assert isinstance(dense, Conv1D)
    assert_no_further(layer(x), dense(x), dense.double()(x.double()))
    assert float((layer(x) - own(x)).detach().norm() / own(x).detach().norm()) < 0.02


def test_a_change_of_dtype_leaves_codes_alone():
    weight = NF4.quantize(drawn((12, 64), torch.float32), torch.float32)
    layer = QuantizedLinear(weight, nn.Linear(64, 12))
    values = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, values)
