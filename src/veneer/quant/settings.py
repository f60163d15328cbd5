"""How config.json says that a base is quantized. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.errors import ModelError

Bits = Literal[4, 8]


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes has quantized a model: its bits, and whether the head is quantized too."""

    bits: Bits
    head: bool


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return how a model is quantized, or None for one that is dense. Raises ModelError for what
    bitsandbytes did not quantize."""
    how = config.get("quantization_config")
    if not how:
        return None
    method = how.get("quant_method", "an unknown method") if isinstance(how, Mapping) else how
    if method != "bitsandbytes":
        raise ModelError(
            f"This model is quantized by {method}, but only bitsandbytes' 4 and 8 bits can be "
            "trained on here. Take the model before it was quantized."
        )
    # No module is skipped where the head is quantized too, which a tied one never is.
    head = how.get("llm_int8_skip_modules") == [] and not config.get("tie_word_embeddings")
    return Quantization(8 if how.get("load_in_8bit") else 4, head)
