"""What a caller can add to an adapter's files when they are read or written."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from veneer.formats.base_structure import BaseStructure


@dataclass(frozen=True)
class FormatOptions:
    """What a person, or a model at hand, adds to what the files of an adapter say.

    alpha, enable_lora: what loralib's files leave out. allow_bin: read PEFT's adapter_model.bin
    too, a pickle, of which only tensors are taken. approximate: write what a format cannot express
    as near as it can. tokenizer: stored with a native adapter.
    """

    base: BaseStructure | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    allow_bin: bool = False
    approximate: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
