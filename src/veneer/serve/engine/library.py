"""Adapters by name, as they lie in directories. What is ready to act is in `resident.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from threading import Lock

from veneer.adapter.config import LoRA
from veneer.adapter.method import in_words
from veneer.errors import AdapterError, listed, nearest
from veneer.formats.adapters import read

_versions = count(1)


@dataclass(frozen=True)
class Description:
    """What an adapter is: its method in words, rank and targets (0 and none where it has none),
    parameters, and the base that it was trained on."""

    what: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    base: str


@dataclass(frozen=True)
class Entry:
    """A directory that was added under a name; the same name added again is another version."""

    name: str
    directory: Path
    version: int
    added: datetime

    @cached_property
    def description(self) -> Description:
        """What the adapter is, read when it is first asked for. Raises AdapterError."""
        state = read(self.directory)
        config = state.config
        parameters = sum(tensor.numel() for tensor in state.tensors.values())
        if not isinstance(config, LoRA):
            return Description(in_words(config), 0, (), parameters, state.base_name)
        what = "DoRA" if config.dora else "LoRA"
        targets = tuple(config.targets)
        return Description(what, config.rank, targets, parameters, state.base_name)


class Library:
    """Adapters by name. A name that is added again stands for the new directory from then on;
    requests that were there before go on with what they began with. For any thread."""

    def __init__(self, adapters: Mapping[str, str | Path] | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = Lock()
        for name, directory in (adapters or {}).items():
            self.add(name, directory)

    def add(self, name: str, directory: str | Path) -> Entry:
        """Add the adapter in `directory`, or put it in the place of one of that name.

        It is read when it is first used; `Engine.load` reads it at once and proves that it fits.
        Raises AdapterError where there is no such directory, or no name.
        """
        place = Path(directory)
        if not name:
            raise AdapterError("An adapter needs a name.")
        if not place.exists():
            raise AdapterError(f"There is no adapter directory {place}.")
        entry = Entry(name, place, next(_versions), datetime.now(UTC))
        with self._lock:
            self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Let a name stand for nothing any more. Raises AdapterError if it does already."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        with self._lock:
            return tuple(sorted(self._entries))

    def info(self, name: str) -> Entry:
        """Return the version that a name stands for now. Raises AdapterError for an unknown one."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            return self._entries[name]

    def _unknown(self, name: str) -> AdapterError:
        known = sorted(self._entries)
        some = listed(known, most=20) or "none"
        return AdapterError(f"No adapter is called {name!r} (known: {some}){nearest(name, known)}.")
