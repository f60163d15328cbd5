"""Plain models written to disk, without adapters."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import ModelError
from veneer.files import new_directory, write_tensors
from veneer.quant.weight import quantized_layers

MARKERS = ("model.pt", "config.json")  # a MiniGPT's, and every other model's


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a plain model, all of it at once.

    A MiniGPT becomes config.json, model.pt and tokenizer.json; every other model a transformers
    directory. Raises ModelError for a quantized model, which merging would make plain.
    """
    if quantized_layers(model):
        raise ModelError(
            "This model is quantized, and not a plain one; merge() makes a plain one of it."
        )
    with new_directory(directory, marker=marker_of(model)) as new:
        if _is_minigpt(model):
            model.config.to_json_file(new / "config.json")
            write_tensors(new / "model.pt", model.state_dict())
            tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
        else:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)


def marker_of(model: PreTrainedModel) -> str:
    """Return the file by which a directory is known to hold a model such as this one."""
    return MARKERS[0] if _is_minigpt(model) else MARKERS[1]


def _is_minigpt(model: PreTrainedModel) -> bool:
    return model.config.model_type == "minigpt"
