"""An adapter from one format into another, and what was changed on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from veneer.adapter.choose import PRESETS
from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, VeneerError
from veneer.formats import table as formats
from veneer.formats.fold import uniform
from veneer.formats.given import Given
from veneer.formats.known_base import KnownBase
from veneer.formats.names import FormatName
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate


@dataclass(frozen=True)
class Converted:
    """What a conversion read, and the notes: everything that was folded or approximated."""

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

    base: its structure alone will do, on the meta device; what it tells of an adapter's layers some
    formats cannot do without. rank: give every layer this rank, filled up with zeros, and one
    scaling. force: replace an adapter that stands in `out`. allow_bin: read PEFT's pickles too.

    Raises AdapterError for what cannot be read, does not fit the base, or has no place in `to`;
    VeneerError if `out` holds something.
    """
    kind = formats.found(source)
    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise VeneerError(f"{out} holds something already; name another place, or use --force.")
    known = KnownBase(base) if base is not None else None
    # A loralib file is read with enable_lora; for every other adapter it is meant for writing.
    read_parts = enable_lora if kind == "loralib" and source.is_file() else None
    written_parts = enable_lora if read_parts is None or to == "loralib" else None
    state = formats.read(
        source, Given(known, alpha=alpha, enable_lora=read_parts, allow_bin=allow_bin)
    )
    assert kind is not None
    if base is not None:
        state = _over(state, base, base_name)
    state = by_path(state, known)
    notes: list[str] = []
    if rank is not None:
        state, notes = uniform(state, rank)
    given = Given(known, enable_lora=written_parts, approximate=approximate)
    notes += formats.write(state, out, to, given)
    layers = sum(1 for _ in state.layers())
    return Converted(kind, layers, tuple(dict.fromkeys(notes)))


def by_path(state: AdapterState, base: KnownBase | None = None) -> AdapterState:
    """Return an adapter whose targets say which layers are meant without a model to look into:
    names and paths, but neither presets, patterns nor slices."""
    config = state.config
    if not isinstance(config, LoRA):
        return state
    paths = {layer.path for layer in state.layers()}
    if base is not None:
        targets = base.short_names(paths)
    elif config.layers or any(t in PRESETS or t.startswith("re:") for t in config.targets):
        targets = tuple(sorted(paths))
    else:
        return state
    return replace(state, config=replace(config, targets=targets, layers=None))


def _over(state: AdapterState, base: PreTrainedModel, name: str) -> AdapterState:
    """Return the adapter with its base's name, having seen that it fits the base's structure."""
    bare = replace(state, base_weights={})  # they are compared with weights, which are not there
    if problems := validate(base, bare, None, force=True):
        raise AdapterError("This adapter does not fit the base: " + "; ".join(problems) + ".")
    return replace(state, base_name=state.base_name or name)
