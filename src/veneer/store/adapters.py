"""Save the adapter of a model, and load one of any known format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import AdapterError
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
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter called `name` (by default the one in use) to a directory, all at once.

    `tokenizer`, if given, is kept with a native adapter and ties it to the base's vocabulary.
    `training` says how the adapter came about, for its model card: {"data": a hash of it, "recipe":
    the settings}; one that was loaded keeps what it brought.
    """
    state = capture(model, name, tokenizer)
    if training is not None:
        state = replace(state, training=training)
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
    allow_bin: bool = False,
) -> PreTrainedModel:
    """Lay the adapter in a directory over `model`, frozen and in use, and return the model.

    The format is recognised by content. New words that the adapter brings are added to
    `tokenizer`. With `allow_bin`, PEFT's adapter_model.bin, a pickle, is read too, but nothing of
    it except tensors. Raises AdapterError for a damaged adapter or a foreign base (unless `force`).
    """
    state = read(Path(directory), allow_bin=allow_bin)
    install(model, state, name=name, tokenizer=tokenizer, force=force)
    return model


def read(directory: Path, *, allow_bin: bool = False) -> AdapterState:
    """Read an adapter of any known format. Raises AdapterError if the directory holds none."""
    if method := native.found_method(directory):
        return native.read(directory, method)
    if peft.is_here(directory):
        return peft.read(directory, allow_bin=allow_bin)
    if not directory.is_dir():
        raise AdapterError(f"There is no adapter directory {directory}.")
    raise AdapterError(
        f"{directory} holds no adapter: neither {native.config_name('lora')} nor "
        f"{peft.CONFIG} with {peft.WEIGHTS}."
    )
