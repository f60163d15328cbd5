"""Save the adapter of a model, and load one of any known format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
) -> None:
    """Write the adapter called `name` (by default the one in use) to a directory, all at once.

    `tokenizer`, if given, is kept with a native adapter and ties it to the base's vocabulary.
    """
    write(capture(model, name, tokenizer), Path(directory), format=format, tokenizer=tokenizer)


def write(
    state: AdapterState,
    directory: Path,
    *,
    format: Format = "native",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an adapter to a directory, all at once. Raises AdapterError for an unknown format."""
    if format == "native":
        native.write(state, directory, tokenizer)
    elif format == "peft":
        peft.write(state, directory)
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


def holds_adapter(place: Path) -> bool:
    """Return whether there is an adapter of a known format at `place`, and no model to load."""
    is_peft = (place / peft.CONFIG).is_file() and (place / peft.WEIGHTS).is_file()
    return is_peft or native.found_method(place) is not None


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
