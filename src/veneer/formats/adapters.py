"""Save a model's adapter, load one, and read or write one without its model, in any format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, VeneerWarning
from veneer.formats import table as formats
from veneer.formats.base_structure import BaseStructure
from veneer.formats.capture import capture
from veneer.formats.install import install
from veneer.formats.locate import locate
from veneer.formats.names import FormatName
from veneer.formats.options import FormatOptions
from veneer.formats.state import AdapterState
from veneer.formats.training import computed_in, other_base
from veneer.models.fingerprint import base_parameters
from veneer.processes.sharded import is_sharded
from veneer.processes.world import World


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    format: FormatName = "native",
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the adapter called `name` (by default the one in use) to a directory, all at once.

    tokenizer: stored with a native adapter, which then fits only bases of the same vocabulary.
    training: how it was trained, beside what the base is computed in: {"data": a hash, "recipe":
    the settings, "system": the system prompt of all conversations}; a loaded adapter has what its
    files say. Returns notes on what was folded for the format. Raises AdapterError for what the
    format cannot express. Warns (VeneerWarning) of weights of the base that train too and are not
    in the adapter.

    Where FSDP2 shards the model, each process must call this, and the first one writes.
    """
    state = capture(model, name, tokenizer)
    if isinstance(state.config, LoRA) or not state.config.replaces_weights:
        own = base_parameters(model)
        trained = [path for path, weight in own.items() if weight.requires_grad]
        if lost := [path for path in trained if path not in state.modules_to_save]:
            warnings.warn(
                f"{', '.join(lost)} train too and are not in the adapter; keep them with the "
                "model, as merge(model).save_pretrained(...) does.",
                VeneerWarning,
                stacklevel=2,
            )
    if training is not None:
        state = replace(state, training={**state.training, **training})
    if is_sharded(model) and not World.current().writes:
        return []
    options = FormatOptions(BaseStructure(model), tokenizer=tokenizer)
    return formats.write(state, Path(directory), format, options)


def load(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    allow_bin: bool = False,
    alpha: float | None = None,
    enable_lora: tuple[bool, ...] | None = None,
) -> PreTrainedModel:
    """Load an adapter onto `model`, frozen and in use, and return the model.

    The format is recognised by content; a run's directory and a checkpoint are taken too. New
    tokens of the adapter are added to `tokenizer`. With `allow_bin`, PEFT's adapter_model.bin is
    read too, a pickle of which only tensors are taken. `alpha` and `enable_lora` are for loralib's
    files, which do not have them. Raises AdapterError for a damaged adapter or one of another base
    (unless `force`). Warns (VeneerWarning) where it was trained over the base in other bits.
    """
    options = FormatOptions(
        BaseStructure(model), alpha=alpha, enable_lora=enable_lora, allow_bin=allow_bin
    )
    path = locate(Path(directory)).path
    state = formats.read(path, options)
    install(model, state, name=name, tokenizer=tokenizer, force=force)
    if text := other_base(f"The adapter in {path}", state.training, computed_in(model)):
        warnings.warn(text, VeneerWarning, stacklevel=2)
    return model


def holds_adapter(path: Path) -> bool:
    """Return whether `locate` finds an adapter by `path`."""
    try:
        locate(path)
    except AdapterError:
        return False
    return True


def read(
    directory: Path,
    base: PreTrainedModel | None = None,
    *,
    allow_bin: bool = False,
    shapes_only: bool = False,
) -> AdapterState:
    """Read the adapter that `locate` finds, of any format.

    base: needed by some formats, also as a skeleton; else they read the one that the files name.
    shapes_only: read no values where the format allows that; the tensors are on the meta device.
    """
    structure = None if base is None else BaseStructure(base)
    options = FormatOptions(structure, allow_bin=allow_bin, shapes_only=shapes_only)
    return formats.read(locate(directory).path, options)


def write(
    state: AdapterState,
    directory: Path,
    *,
    format: FormatName = "native",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Write an adapter without its model, all at once, and return notes as `save` does."""
    return formats.write(state, directory, format, FormatOptions(tokenizer=tokenizer))
