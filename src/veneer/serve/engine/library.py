"""Adapters by name, as they lie in directories. Those in memory are in `adapter_cache.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Lock

from veneer.errors import AdapterError, listed, nearest

_versions = count(1)


@dataclass(frozen=True)
class Entry:
    """An adapter that was added under a name; the same name added again is another version.

    refusal: why it cannot be served, as a sentence; empty where it can.
    """

    name: str
    directory: Path
    version: int
    refusal: str = ""


Mix = tuple[tuple[Entry, float], ...]  # versions with their weights; none for the base alone


def unmixed(mix: Mix) -> Entry | None:
    """Return the one adapter that a mix is, at its full weight; None for every other mix."""
    return mix[0][0] if len(mix) == 1 and mix[0][1] == 1.0 else None


class Library:
    """Adapters by name, for any thread.

    A name that is added again means the new directory from then on; requests that have begun go on
    with the version that they began with.
    """

    def __init__(self, adapters: Mapping[str, str | Path] | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = Lock()
        for name, directory in (adapters or {}).items():
            self.add(name, directory)

    def add(self, name: str, directory: str | Path, *, refusal: str = "") -> Entry:
        """Add the adapter in `directory`, or replace the one of that name.

        It is read when it is first used; `Engine.load` reads it at once and checks that it fits.
        With a `refusal` it is kept only to say why it cannot be served. Raises AdapterError where
        there is nothing at `directory`, or no name.
        """
        path = Path(directory)
        if not name:
            raise AdapterError("An adapter needs a name.")
        if not path.exists():
            raise AdapterError(f"There is no adapter directory {path}.")
        entry = Entry(name, path, next(_versions), refusal)
        with self._lock:
            self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Remove a name. Raises AdapterError for an unknown one."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def refuse(self, entry: Entry, why: str) -> None:
        """Keep an adapter only to say why it cannot be served, unless its name means another
        version by now."""
        with self._lock:
            if self._entries.get(entry.name) == entry:
                self._entries[entry.name] = replace(entry, refusal=why)

    def names(self) -> tuple[str, ...]:
        """Return the names of all that can be served, sorted."""
        return tuple(entry.name for entry in self.entries() if not entry.refusal)

    def entries(self) -> tuple[Entry, ...]:
        """Return all adapters, also those that cannot be served, sorted by name."""
        with self._lock:
            return tuple(self._entries[name] for name in sorted(self._entries))

    def find(self, name: str) -> Entry | None:
        """Return the version that a name means now, None for an unknown one."""
        with self._lock:
            return self._entries.get(name)

    def info(self, name: str) -> Entry:
        """Return the version that a name means now. Raises AdapterError for an unknown one."""
        if (entry := self.find(name)) is None:
            raise self._unknown(name)
        return entry

    def _unknown(self, name: str) -> AdapterError:
        names = sorted(self._entries)
        some = listed(names, most=20) or "none"
        return AdapterError(f"No adapter is called {name!r} (known: {some}){nearest(name, names)}.")
