"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

from veneer.adapter.method import Method
from veneer.errors import AdapterError, ModelError, listed, shortened
from veneer.files import (
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from veneer.formats.base_structure import BaseStructure
from veneer.formats.card import card
from veneer.formats.fold import without_start
from veneer.formats.peft.experts import TAKEN_SOMEWHERE, taken_for_stacks
from veneer.formats.peft.reading import state_of
from veneer.formats.peft.writing import config_of, new_tokens_as_trained, tensors_of
from veneer.formats.state import AdapterState
from veneer.formats.training import write_beside
from veneer.models.load import load_config

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICKLE = "adapter_model.bin"


def detects(directory: Path) -> bool:
    """Return whether a directory holds an adapter of PEFT's, also a pickle."""
    weights = (directory / name for name in (WEIGHTS, PICKLE))
    return (directory / CONFIG).is_file() and any(file.is_file() for file in weights)


def write(state: AdapterState, directory: Path, base: BaseStructure | None = None) -> list[str]:
    """Write PEFT's directory, all of it at once; return notes on what was folded.

    base: says which names PEFT would take for those of experts; without it, the configuration of
    the base that the adapter names does, and where that is not at hand either, a note says so.
    Raises AdapterError for what PEFT has no place for.
    """
    if isinstance(state.config, Method) and state.config.replaces_weights:
        raise AdapterError(f"PEFT has no format for {state.config.method}; write it natively.")
    state, notes = without_start(new_tokens_as_trained(state))
    model_type, unclear = _model_type(state, base)
    tensors, config = tensors_of(state, base), config_of(state, model_type)
    with new_directory(directory, marker=CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_text(new / CARD, card(state))
        write_beside(new, state.training)
        write_json(new / CONFIG, config)
    return notes + unclear


def read(
    directory: Path,
    base: BaseStructure | None = None,
    *,
    allow_bin: bool = False,
    shapes_only: bool = False,
) -> AdapterState:
    """Read PEFT's directory; with `allow_bin` also adapter_model.bin, a pickle, of which only
    tensors are taken; with `shapes_only` no values. Raises AdapterError, naming the directory.

    base: if it is there, it says which layers and parameters target names can mean.
    """
    config = read_json(directory / CONFIG)
    weights = directory / WEIGHTS
    if not weights.is_file():
        weights = directory / PICKLE
        if not allow_bin:
            raise AdapterError(
                f"{weights} is a pickle. To read it, and nothing of it but tensors, give "
                "--allow-bin, or allow_bin=True; a file of safetensors needs no permission."
            )
    try:
        tensors = read_tensors(weights, shapes_only=shapes_only)
        return state_of(config, tensors, base)
    except AdapterError as error:
        why = shortened(str(error), 20_000)
        raise AdapterError(f"The PEFT adapter in {directory} cannot be used: {why}.") from error


def _model_type(state: AdapterState, base: BaseStructure | None) -> tuple[str | None, list[str]]:
    """Return the base's model_type, or None where it is not known, and a note if that leaves open
    what PEFT makes of the layers' names."""
    if base is not None:
        return getattr(base.config, "model_type", ""), []
    paths = [layer.path for layer in state.layers() if layer.kind == "linear"]
    names = {path.rpartition(".")[2] for path in paths} & TAKEN_SOMEWHERE
    if not names:
        return None, []
    try:
        if state.base_name:
            return load_config(state.base_name).model_type, []
    except ModelError:
        pass
    if taken_for_stacks(paths, None):  # written by their weights, which is right over any base
        return None, []
    note = (
        f"The base, {state.base_name or 'which has no name'}, cannot be looked at. If it is a "
        f"mixture of experts, PEFT takes {listed(sorted(names))} for the names of its experts: "
        "write the adapter again with its base (--base)."
    )
    return None, [note]
