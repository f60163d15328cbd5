"""Save the adapter of a model, and load one of any known format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import AdapterError, VeneerWarning
from veneer.lowrank.config import LoRA
from veneer.models.fingerprint import base_parameters
from veneer.store import native, peft
from veneer.store.state import AdapterState, capture, install

Format = Literal["native", "peft"]


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    format: Format = "native",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the adapter called `name` (by default the one in use) to a directory, all at once.

    `tokenizer`, if given, is kept with a native adapter and ties it to the base's vocabulary.
    Warns (VeneerWarning) of weights of the base that train too, which are no part of an adapter.
    """
    state = capture(model, name, tokenizer)
    if isinstance(state.config, LoRA) or not state.config.replaces_weights:
        own = base_parameters(model)
        if beside := [path for path, weight in own.items() if weight.requires_grad]:
            warnings.warn(
                f"{', '.join(beside)} train too and are no part of the adapter; keep them with "
                "the model, as merge(model).save_pretrained(...) does.",
                VeneerWarning,
                stacklevel=2,
            )
    if format == "native":
        native.write(state, Path(directory), tokenizer)
    elif format == "peft":
        peft.write(state, Path(directory))
    else:
        raise AdapterError(f"{format!r} is no format to write; native and peft are.")


def load(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
) -> PreTrainedModel:
    """Lay the adapter in a directory over `model`, frozen and in use, and return the model.

    The format is recognised by content. New words that the adapter brings are added to
    `tokenizer`. Raises AdapterError for a damaged adapter or a foreign base (unless `force`).
    """
    state = read(Path(directory))
    install(model, state, name=name, tokenizer=tokenizer, force=force)
    return model


def read(directory: Path) -> AdapterState:
    """Read an adapter of any known format. Raises AdapterError if the directory holds none."""
    if method := native.found_method(directory):
        return native.read(directory, method)
    if (directory / peft.CONFIG).is_file() and (directory / peft.WEIGHTS).is_file():
        return peft.read(directory)
    if not directory.is_dir():
        raise AdapterError(f"There is no adapter directory {directory}.")
    raise AdapterError(
        f"{directory} holds no adapter: neither {native.config_name('lora')} nor "
        f"{peft.CONFIG} with {peft.WEIGHTS}."
    )
