"""How a base's weights are kept, and how config.json says that they are quantized. Imports no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.errors import ModelError

Bits = Literal[4, 8]
LoadBits = Literal[4, 8, 16]  # 16: dense, where a file's own blocks could stay
# Where a frozen base's weights are while they are not used: on the device, in this machine's
# memory, or on its disk.
Offload = Literal["none", "cpu", "disk"]
Method = Literal["bitsandbytes", "mxfp4", "fp8", "gptq", "awq", "compressed-tensors"]
# The forms of compressed-tensors' weights, as its files call them.
INTEGERS, FLOATS = ("pack-quantized", "int-quantized", "naive-quantized"), ("float-quantized",)
TAKE_ANOTHER = "Take the model before it was quantized, or one in another format."


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized: its bits, whether the head is quantized too, and by what method.

    ignores: what the files ask for beside quantized weights and Veneer leaves undone, or "".
    """

    bits: Bits
    head: bool
    method: Method = "bitsandbytes"
    ignores: str = ""

    @property
    def is_published(self) -> bool:
        """Whether the files' own format stays, which Veneer reads and does not write."""
        return self.method != "bitsandbytes"


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return how a model is quantized, or None for one that is dense. Raises ModelError for what
    cannot be read here."""
    how = config.get("quantization_config")
    if not how:
        return None
    if not isinstance(how, Mapping):
        raise ModelError(f"Its quantization_config is {how!r}, which says nothing. {TAKE_ANOTHER}")
    method = how.get("quant_method", "an unknown method")
    if method == "bitsandbytes":
        # No module is skipped where the head is quantized too, which a tied one never is.
        head = how.get("llm_int8_skip_modules") == [] and not config.get("tie_word_embeddings")
        return Quantization(8 if how.get("load_in_8bit") else 4, head)
    read = {
        "mxfp4": _mxfp4,
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
    }.get(method)
    if read is None:
        known = "bitsandbytes, MXFP4, FP8, GPTQ, AWQ and compressed-tensors"
        raise ModelError(
            f"This model is quantized by {method}, but only {known} can be trained on here. "
            f"{TAKE_ANOTHER}"
        )
    return read(how)


def _mxfp4(how: Mapping[str, Any]) -> Quantization:
    return Quantization(4, False, "mxfp4")


def _fp8(how: Mapping[str, Any]) -> Quantization:
    _expect("FP8", how, "fmt", "e4m3")
    return Quantization(8, False, "fp8", _activations(8))


def _gptq(how: Mapping[str, Any]) -> Quantization:
    _expect("GPTQ", how, "bits", 4, 8)
    _expect("GPTQ", how, "checkpoint_format", "gptq", "gptq_v2")
    _expect("GPTQ", how, "pack_dtype", "int32")
    return Quantization(how.get("bits", 4), bool(how.get("lm_head")), "gptq")


def _awq(how: Mapping[str, Any]) -> Quantization:
    form = how.get("version", how.get("format", "gemm"))
    _expect("AWQ", how, "bits", 4)
    _expect("AWQ", {"version": str(form).lower()}, "version", "gemm")
    _expect("AWQ", how, "zero_point", True)
    return Quantization(4, False, "awq")


def _compressed_tensors(how: Mapping[str, Any]) -> Quantization:
    name = "compressed-tensors"
    sparsity = (how.get("sparsity_config") or {}).get("format", "dense")
    _expect(name, {"sparsity": sparsity}, "sparsity", "dense")
    if how.get("transform_config"):
        raise ModelError(f"This model has transforms of its activations, which {_NOT_HERE}")
    groups = list((how.get("config_groups") or {}).values())
    if not groups:
        raise ModelError(f"This model's config_groups say nothing of its weights. {TAKE_ANOTHER}")
    for group in groups:
        weights = group.get("weights")
        if not weights:
            raise ModelError(f"This model quantizes activations alone, which {_NOT_HERE}")
        _expect(
            name, {"format": group.get("format") or how.get("format")}, "format", *INTEGERS, *FLOATS
        )
        _expect(name, weights, "type", "int", "float")
        _expect(name, weights, "num_bits", *((8,) if weights.get("type") == "float" else (4, 8)))
        _expect(name, weights, "strategy", "tensor", "channel", "group", "block")
    bits: Bits = min(group["weights"].get("num_bits", 8) for group in groups)
    head = not any("lm_head" in str(path) for path in how.get("ignore") or ())
    inputs = [group.get("input_activations") for group in groups]
    activations = next((each.get("num_bits", 8) for each in inputs if each), None)
    return Quantization(
        bits, head, "compressed-tensors", _activations(activations) if activations else ""
    )


def _activations(bits: int) -> str:
    return f"inputs of layers in {bits} bits"


_NOT_HERE = f"cannot be computed here. {TAKE_ANOTHER}"


def _expect(name: str, how: Mapping[str, Any], key: str, *known: object) -> None:
    """Raise ModelError where a setting is given and is none of those that can be read."""
    value = how.get(key)
    if value is not None and value not in known:
        choices = " or ".join(map(str, known))
        raise ModelError(
            f"This model is quantized by {name} with {key} {value}, but only {choices} can be "
            f"read. {TAKE_ANOTHER}"
        )
