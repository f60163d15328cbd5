"""Random weights in published formats, written here from each format's own description: the tensors
by their names in files, and the numbers that these stand for, by the format's own program where it
can be had, else by its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """config: the model's `quantization_config`. write: returns the tensors of a linear layer
    (out, in) by the ends of their names. exact: returns the numbers in the dtype of its scales, or
    in float32 if told so."""

    name: str
    config: dict[str, Any]
    write: Callable[[int, int, torch.Generator], Tensors]
    exact: Callable[[Tensors, torch.dtype | None], Tensor]
    kind: str
    bits: int

    def __str__(self) -> str:
        return self.name


def _scales(shape: tuple[int, ...], draw: torch.Generator, mean: float) -> Tensor:
    return mean * (0.5 + torch.rand(shape, generator=draw))


def _codes(shape: tuple[int, ...], below: int, draw: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=draw)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return codes (rows, n) as words (rows, n · bits / 32), the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)
    words = (codes.long().unflatten(1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    numbers = words.long() % 2**32
    return torch.stack([(numbers >> s) % 2**bits for s in range(0, 32, bits)], -1).flatten(1)


def mxfp4(out: int, in_: int, draw: torch.Generator) -> Tensors:
    return {
        "blocks": _codes((out, in_ // 32, 16), 256, draw).to(torch.uint8),
        "scales": (118 + _codes((out, in_ // 32), 4, draw)).to(torch.uint8),
    }


def exact_mxfp4(tensors: Tensors, dtype: torch.dtype | None) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = tensors["blocks"][None], tensors["scales"][None]
    return convert_moe_packed_tensors(blocks, scales, dtype=dtype or torch.bfloat16)[0].T


def fp8(
    block: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    name: str = "weight_scale_inv",
) -> Callable[[int, int, torch.Generator], Tensors]:
    def write(out: int, in_: int, draw: torch.Generator) -> Tensors:
        codes = (100 * torch.randn(out, in_, generator=draw)).to(torch.float8_e4m3fn)
        shape = () if block is None else (-(out // -block[0]), -(in_ // -block[1]))
        scales = _scales(shape, draw, 4e-4)
        if dtype == torch.float8_e8m0fnu:
            scales = scales.log2().round().exp2()
        return {"weight": codes, name: scales.to(dtype)}

    return write


def exact_fp8(
    block: tuple[int, int] | None,
) -> Callable[[Tensors, torch.dtype | None], Tensor]:
    def exact(tensors: Tensors, dtype: torch.dtype | None) -> Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        scales = next(t for name, t in tensors.items() if "scale" in name)
        codes = tensors["weight"]
        # theirs takes whole blocks, so it gets a weight that is filled up
        (rows, cols), size = block or codes.shape, codes.shape
        filled = torch.zeros(-(size[0] // -rows) * rows, -(size[1] // -cols) * cols)
        filled[: size[0], : size[1]] = codes.float()
        grid = scales.reshape(1, 1) if block is None else scales
        theirs = Fp8Dequantize(None)._dequantize_one(
            filled.to(torch.float8_e4m3fn), grid, output_dtype=dtype or torch.bfloat16
        )
        return theirs[: size[0], : size[1]]

    return exact


def gptq(
    bits: int, group: int, *, apart: bool = False, older: bool = True
) -> Callable[[int, int, torch.Generator], Tensors]:
    def write(out: int, in_: int, draw: torch.Generator) -> Tensors:
        size = in_ if group < 0 else group
        groups, most = -(in_ // -size), 2**bits
        codes = _codes((in_, out), most, draw)
        # the older files cannot have the zero point 0, for which they would borrow
        zeros = 1 + _codes((groups, out), most - 1, draw)
        g_idx = torch.arange(in_) // size
        return {
            "qweight": _words(codes.T, bits).T.contiguous(),
            "qzeros": _words(zeros - 1 if older else zeros, bits),
            "scales": _scales((groups, out), draw, 0.1 / most).to(torch.float16),
            "g_idx": (g_idx[torch.randperm(in_, generator=draw)] if apart else g_idx).int(),
        }

    return write


def exact_gptq(bits: int, older: bool) -> Callable[[Tensors, torch.dtype | None], Tensor]:
    def exact(tensors: Tensors, dtype: torch.dtype | None) -> Tensor:
        scales, of = tensors["scales"], tensors["g_idx"].long()
        scales = scales if dtype is None else scales.to(dtype)
        codes = _from_words(tensors["qweight"].T, bits).T  # (in, out)
        zeros = _from_words(tensors["qzeros"], bits) + int(older)
        return (scales[of] * (codes - zeros[of])).T

    return exact


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each code of a word, as AutoAWQ packs them


def awq(group: int) -> Callable[[int, int, torch.Generator], Tensors]:
    def words(codes: Tensor) -> Tensor:
        return _words(codes.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    def write(out: int, in_: int, draw: torch.Generator) -> Tensors:
        groups = -(in_ // -(in_ if group < 0 else group))
        return {
            "qweight": words(_codes((in_, out), 16, draw)),
            "qzeros": words(_codes((groups, out), 16, draw)),
            "scales": _scales((groups, out), draw, 0.006).to(torch.float16),
        }

    return write


def exact_awq(group: int) -> Callable[[Tensors, torch.dtype | None], Tensor]:
    def exact(tensors: Tensors, dtype: torch.dtype | None) -> Tensor:
        def codes(words: Tensor) -> Tensor:
            unordered = _from_words(words, 4).unflatten(1, (-1, 8))
            ordered = torch.empty_like(unordered)
            ordered[..., AWQ_ORDER] = unordered
            return ordered.flatten(1)

        scales = tensors["scales"] if dtype is None else tensors["scales"].to(dtype)
        of = torch.arange(len(tensors["qweight"])) // (
            len(tensors["qweight"]) if group < 0 else group
        )
        return ((codes(tensors["qweight"]) - codes(tensors["qzeros"])[of]) * scales[of]).T

    return exact


def _compressor(weights: dict[str, Any], form: str) -> tuple[Any, Any]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry(form), scheme


def compressed(
    weights: dict[str, Any], form: str, dtype: torch.dtype = torch.bfloat16
) -> Callable[[int, int, torch.Generator], Tensors]:
    """Return a writer that has compressed-tensors itself compress a random weight."""

    def write(out: int, in_: int, draw: torch.Generator) -> Tensors:
        compressor, scheme = _compressor(weights, form)
        shape: tuple[int, ...] = {
            "tensor": (1,),
            "channel": (out, 1),
            "group": (out, in_ // weights.get("group_size", in_)),
            "block": tuple(-(n // -128) for n in (out, in_)),
        }[weights["strategy"]]
        most = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1)
        state = {
            "weight": 0.02 * torch.randn(out, in_, generator=draw),
            "weight_scale": _scales(shape, draw, 0.08 / most).to(dtype),
        }
        if not weights["symmetric"]:
            state["weight_zero_point"] = (_codes(shape, 8, draw) - 4).to(torch.int8)
        written = compressor.compress(state, scheme)
        return {name: tensor.contiguous() for name, tensor in written.items()}

    return write


def exact_compressed(
    weights: dict[str, Any], form: str
) -> Callable[[Tensors, torch.dtype | None], Tensor]:
    def exact(tensors: Tensors, dtype: torch.dtype | None) -> Tensor:
        compressor, scheme = _compressor(weights, form)
        state = dict(tensors)
        if dtype is not None:
            state["weight_scale"] = state["weight_scale"].to(dtype)
        return compressor.decompress(state, scheme)["weight"]

    return exact


def _compressed_case(
    name: str, form: str, *, num_bits: int, strategy: str, type: str = "int", **others: Any
) -> Case:
    weights = {"num_bits": num_bits, "type": type, "strategy": strategy, "symmetric": True} | others
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    write, exact = compressed(weights, form), exact_compressed(weights, form)
    return Case(name, config, write, exact, "compressed-tensors", num_bits)


def _fp8_case(name: str, block: tuple[int, int] | None, *how: Any, **config: Any) -> Case:
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return Case(name, own | config, fp8(block, *how), exact_fp8(block), "fp8", 8)


def _gptq_case(
    name: str, bits: int, group: int, *, apart: bool = False, older: bool = True
) -> Case:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": apart,
        "checkpoint_format": "gptq" if older else "gptq_v2",
    }
    write = gptq(bits, group, apart=apart, older=older)
    return Case(name, config, write, exact_gptq(bits, older), "gptq", bits)


def _awq_case(name: str, group: int) -> Case:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    return Case(name, config, awq(group), exact_awq(group), "awq", 4)


LINEAR = [
    _fp8_case("fp8", (128, 128)),
    _fp8_case("fp8-16-bit-scales", (64, 32), torch.bfloat16),
    _fp8_case("fp8-power-scales", (128, 128), torch.float8_e8m0fnu, scale_fmt="ue8m0"),
    _fp8_case("fp8-tensor", None),
    _gptq_case("gptq", 4, 32),
    _gptq_case("gptq-desc-act", 4, 32, apart=True),
    _gptq_case("gptq-v2", 4, 64, older=False),
    _gptq_case("gptq-one-group", 4, -1),
    _gptq_case("gptq-8-bits", 8, 32),
    _gptq_case("gptq-8-bits-desc-act-v2", 8, 32, apart=True, older=False),
    _awq_case("awq", 32),
    _awq_case("awq-one-group", -1),
    _compressed_case("w4a16", "pack-quantized", num_bits=4, strategy="group", group_size=32),
    _compressed_case(
        "w4a16-zeros",
        "pack-quantized",
        num_bits=4,
        strategy="group",
        group_size=32,
        symmetric=False,
    ),
    _compressed_case("w4a16-channel", "pack-quantized", num_bits=4, strategy="channel"),
    _compressed_case("w8a16", "pack-quantized", num_bits=8, strategy="group", group_size=64),
    _compressed_case(
        "w8a16-zeros", "pack-quantized", num_bits=8, strategy="channel", symmetric=False
    ),
    _compressed_case("w8a8", "int-quantized", num_bits=8, strategy="channel"),
    _compressed_case(
        "int8-zeros", "naive-quantized", num_bits=8, strategy="channel", symmetric=False
    ),
    _compressed_case("int8-tensor", "int-quantized", num_bits=8, strategy="tensor"),
    _compressed_case(
        "fp8-channel", "float-quantized", num_bits=8, strategy="channel", type="float"
    ),
    _compressed_case(
        "fp8-of-a-tensor", "float-quantized", num_bits=8, strategy="tensor", type="float"
    ),
    _compressed_case(
        "fp8-blocks",
        "float-quantized",
        num_bits=8,
        strategy="block",
        type="float",
        block_structure=[128, 128],
    ),
]
# Of each format one for tiny layers, of 16 inputs and more.
SMALL = [
    _fp8_case("fp8", (16, 32)),
    _gptq_case("gptq", 4, 16, apart=True),
    _awq_case("awq", 16),
    _compressed_case(
        "w4a16", "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    _compressed_case("w8a8", "int-quantized", num_bits=8, strategy="channel"),
    _compressed_case(
        "fp8-channel", "float-quantized", num_bits=8, strategy="channel", type="float"
    ),
]
MXFP4 = Case("mxfp4", {"quant_method": "mxfp4"}, mxfp4, exact_mxfp4, "mxfp4", 4)
