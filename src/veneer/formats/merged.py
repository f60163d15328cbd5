"""Write a plain model, such as a merged one, to a directory."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import ModelError
from veneer.files import new_directory, write_tensors
from veneer.quant.stack import quantized_modules

MARKERS = ("model.pt", "config.json")  # a MiniGPT's, and every other model's


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a plain model, all of it at once: a MiniGPT as config.json, model.pt and
    tokenizer.json, every other model as a transformers directory. Raises ModelError for a quantized
    model."""
    if quantized_modules(model):
        raise ModelError(
            "This model is quantized, and only a plain one can be written; merge() makes one."
        )
    with new_directory(directory, marker=marker_of(model.config)) as new:
        if model.config.model_type == "minigpt":
            model.config.to_json_file(new / "config.json")
            write_tensors(new / "model.pt", model.state_dict())
            tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
        else:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)


def marker_of(config: PretrainedConfig) -> str:
    """Return the file that marks a directory as one of a model of such a configuration."""
    return MARKERS[0] if config.model_type == "minigpt" else MARKERS[1]
