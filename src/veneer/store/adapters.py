"""Save the adapter of a model, and load one of any known format."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.store import formats
from veneer.store.given import Given
from veneer.store.known_base import KnownBase
from veneer.store.names import FormatName
from veneer.store.state import AdapterState, capture, install


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    format: FormatName = "native",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Write the adapter called `name` (by default the one in use) to a directory, all at once.

    `tokenizer`, if given, is kept with a native adapter and ties it to the base's vocabulary.
    Returns notes: what was folded for a format that says less. Raises AdapterError for what the
    format cannot express.
    """
    state = capture(model, name, tokenizer)
    given = Given(KnownBase(model), tokenizer=tokenizer)
    return formats.write(state, Path(directory), format, given)


def load(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    alpha: float | None = None,
    enable_lora: tuple[bool, ...] | None = None,
) -> PreTrainedModel:
    """Lay the adapter in a directory over `model`, frozen and in use, and return the model.

    The format is recognised by content. New words that the adapter brings are added to
    `tokenizer`. `alpha` and `enable_lora` are for loralib's files, which do not say them. Raises
    AdapterError for a damaged adapter or a foreign base (unless `force`).
    """
    path = Path(directory)
    given = Given(KnownBase(model), alpha=alpha, enable_lora=enable_lora)
    install(model, formats.read(path, given), name=name, tokenizer=tokenizer, force=force)
    return model


def read(directory: Path) -> AdapterState:
    """Read an adapter of any known format that needs no base to be understood."""
    return formats.read(directory, Given())
