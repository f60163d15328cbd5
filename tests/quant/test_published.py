"""Weights in published formats are, bit for bit, what each format's own program makes of them."""

import pytest
import torch

from support.published_weights import LINEAR, MXFP4, Case
from veneer.kernels import published as kernels
from veneer.quant import weight as quant_weight
from veneer.quant.fp8 import FP8
from veneer.quant.mxfp4 import MXFP4 as OurMXFP4
from veneer.quant.published import published_weight
from veneer.quant.weight import QuantizedWeight, product, product_back

OUT, IN = 80, 192  # neither is whole blocks of 128
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def written(case: Case, out: int = OUT, in_: int = IN) -> dict[str, torch.Tensor]:
    return case.write(out, in_, torch.Generator().manual_seed(7))


def read(case: Case, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> QuantizedWeight:
    if case is MXFP4:
        return OurMXFP4(tensors["blocks"], tensors["scales"], dtype)
    return published_weight(tensors, case.config, dtype)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("case", [*LINEAR, MXFP4], ids=str)
def test_the_values_are_the_formats_own(case, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    tensors = written(case)
    for dtype in DTYPES:
        ours = read(case, tensors, dtype)
        assert (ours.shape, ours.dtype, ours.bits, ours.kind) == (
            (OUT, IN),
            dtype,
            case.bits,
            case.kind,
        )
        # Exact numbers, or those in float32, rounded once: also in the dtype of the scales.
        values, exact = ours.dequantize(), case.exact(tensors, torch.float32)
        assert values.is_contiguous()
        assert torch.equal(values, exact.to(dtype))
        theirs = case.exact(tensors, None)
        if theirs.dtype == dtype:
            assert torch.equal(values, theirs)
        for name, tensor in ours.tensors().items():
            assert tensor.data_ptr() == tensors[name].data_ptr()


@pytest.mark.parametrize("case", [*LINEAR, MXFP4], ids=str)
def test_some_rows_at_a_time(case, monkeypatch):
    tensors = written(case)
    weight = read(case, tensors, torch.float32)
    values = weight.dequantize()
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    monkeypatch.setattr(quant_weight, "BLOCK_NUMBERS", 1)
    assert torch.equal(torch.cat([rows for _, rows in weight.blocks()]), values)
    y = product(x, weight, x.new_empty(5, OUT))
    torch.testing.assert_close(y, x @ values.T)
    torch.testing.assert_close(product_back(dy, weight), dy @ values)
    assert weight.nbytes == sum(t.nbytes for t in weight.tensors().values())


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_every_code_and_every_scale(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in DTYPES[:2]:
        eight = FP8(codes.view(torch.float8_e4m3fn).view(1, 256), torch.ones(()), dtype)
        expected = codes.view(torch.float8_e4m3fn).to(dtype)
        assert torch.equal(eight.dequantize()[0].nan_to_num(7), expected.nan_to_num(7))
        numbers = ~expected.isnan()
        assert torch.equal(eight.dequantize()[0].signbit()[numbers], expected.signbit()[numbers])
        blocks = codes[:16].mul(17).add(16).expand(1, 256, 16).contiguous()
        tensors = {"blocks": blocks, "scales": codes.view(1, 256)}
        ours = read(MXFP4, tensors, dtype).dequantize()
        assert torch.equal(
            ours.nan_to_num(7, 8, 9), MXFP4.exact(tensors, dtype).nan_to_num(7, 8, 9)
        )


def test_groups_in_numbers_of_64_bits():
    case = next(case for case in LINEAR if case.name == "gptq-desc-act")
    tensors = written(case)
    exact = case.exact(tensors, torch.float32)
    tensors["g_idx"] = tensors["g_idx"].long()
    assert torch.equal(read(case, tensors, torch.float32).dequantize(), exact)


def test_groups_of_inputs_that_lie_apart_in_compressed_tensors():
    case = next(case for case in LINEAR if case.name == "w4a16-zeros")
    tensors = written(case)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    exact = case.exact(tensors, torch.float32)
    of = (torch.arange(IN) // 32)[order]
    ours = read(case, tensors | {"weight_g_idx": of.int()}, torch.float32).dequantize()
    same = of == torch.arange(IN) // 32
    assert torch.equal(ours[:, same], exact[:, same])
    assert not torch.equal(ours[:, ~same], exact[:, ~same])
    with pytest.raises(ValueError, match="names other groups"):
        read(case, tensors | {"weight_g_idx": of.int() + 9}, torch.float32)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_tensors_that_do_not_belong_together(case):
    tensors = written(case)
    name = next(name for name in tensors if "scale" in name)
    scales = tensors[name]
    tensors[name] = scales.new_ones(3, 5) if scales.dtype.itemsize > 1 else scales[:0]
    with pytest.raises((ValueError, RuntimeError)):
        read(case, tensors, torch.float32)
