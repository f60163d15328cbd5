"""Convert an adapter from one format into another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from veneer.adapter.config import LoRA
from veneer.adapter.targets import PRESETS
from veneer.errors import AdapterError, VeneerError, joined
from veneer.files import check_writable, remove_leftovers
from veneer.formats import table as formats
from veneer.formats.base_structure import BaseStructure, targets_for
from veneer.formats.fold import uniform
from veneer.formats.locate import locate
from veneer.formats.names import FormatName
from veneer.formats.options import FormatOptions
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate


@dataclass(frozen=True)
class Converted:
    """The format and layers that were read, and notes on what was folded or approximated."""

    source: FormatName
    layers: int
    notes: tuple[str, ...]


def convert(
    source: Path,
    out: Path,
    *,
    to: FormatName,
    base: PreTrainedModel | None = None,
    base_name: str = "",
    alpha: float | None = None,
    enable_lora: tuple[bool, ...] | None = None,
    rank: int | None = None,
    approximate: bool = False,
    force: bool = False,
    allow_bin: bool = False,
) -> Converted:
    """Read the adapter at `source` and write it to `out` in the format `to`.

    base: may be on the meta device; some formats cannot name layers without it. rank: give every
    layer this rank, filled up with zeros, and one scaling. force: replace an adapter in `out`.
    allow_bin: read PEFT's pickles too. Raises AdapterError for what cannot be read, does not fit
    the base, or has no place in `to`; VeneerError if `out` holds something.
    """
    located = locate(source)
    source, kind = located.path, located.format
    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise VeneerError(f"{out} holds something already; name another place, or use --force.")
    check_writable(out.parent if out.is_file() else out)
    remove_leftovers(out.parent, out.name)
    structure = BaseStructure(base) if base is not None else None
    # Reading a loralib file takes enable_lora; for all other adapters it is for writing.
    for_reading = enable_lora if kind == "loralib" and source.is_file() else None
    for_writing = enable_lora if for_reading is None or to == "loralib" else None
    state = formats.read(
        source,
        FormatOptions(structure, alpha=alpha, enable_lora=for_reading, allow_bin=allow_bin),
    )
    if base is not None:
        state = _over(state, base, base_name)
    state = by_path(state, structure)
    notes: list[str] = []
    if rank is not None:
        state, notes = uniform(state, rank)
    options = FormatOptions(structure, enable_lora=for_writing, approximate=approximate)
    notes += formats.write(state, out, to, options)
    layers = sum(1 for _ in state.layers())
    return Converted(kind, layers, tuple(dict.fromkeys(notes)))


def by_path(state: AdapterState, base: BaseStructure | None = None) -> AdapterState:
    """Return the adapter with names and paths as targets: presets, patterns and slices mean
    nothing without a model."""
    config = state.config
    if not isinstance(config, LoRA):
        return state
    paths = {layer.path for layer in state.layers()}
    are_names = not any(t in PRESETS or t.startswith("re:") for t in config.targets)
    if base is None and not config.layers and are_names:
        return state
    targets = targets_for(paths, base)
    return replace(state, config=replace(config, targets=targets, layers=None))


def _over(state: AdapterState, base: PreTrainedModel, name: str) -> AdapterState:
    """Return the adapter with its base's name. Raises AdapterError if it does not fit the base."""
    bare = replace(state, base_weights={})  # the skeleton has no weights to compare them with
    if problems := validate(base, bare, None, force=True):
        raise AdapterError(f"This adapter does not fit the base: {joined(problems)}.")
    return replace(state, base_name=state.base_name or name)
