"""Options of reading and writing an adapter's files."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from veneer.formats.base_structure import BaseStructure


@dataclass(frozen=True)
class FormatOptions:
    """What the caller adds to what an adapter's files say.

    base: its structure, if there is a model. alpha, enable_lora: loralib's files lack them.
    allow_bin: read PEFT's adapter_model.bin too, a pickle of which only tensors are taken.
    approximate: write the nearest that a format can express. tokenizer: stored with a native
    adapter. shapes_only: read no values where the format allows that (tensors on the meta device).
    """

    base: BaseStructure | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    allow_bin: bool = False
    approximate: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    shapes_only: bool = False
