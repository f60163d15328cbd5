"""Adapters by name, as they lie in directories. Those in memory are in `adapter_cache.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock

from veneer.errors import AdapterError, listed, nearest

_versions = count(1)


@dataclass(frozen=True)
class Entry:
    """A directory that was added under a name; the same name added again is another version."""

    name: str
    directory: Path
    version: int


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

    def add(self, name: str, directory: str | Path) -> Entry:
        """Add the adapter in `directory`, or replace the one of that name.

        It is read when it is first used; `Engine.load` reads it at once and checks that it fits.
        Raises AdapterError where there is no such directory, or no name.
        """
        path = Path(directory)
        if not name:
            raise AdapterError("An adapter needs a name.")
        if not path.exists():
            raise AdapterError(f"There is no adapter directory {path}.")
        entry = Entry(name, path, next(_versions))
        with self._lock:
            self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Remove a name. Raises AdapterError for an unknown one."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        with self._lock:
            return tuple(sorted(self._entries))

    def info(self, name: str) -> Entry:
        """Return the version that a name means now. Raises AdapterError for an unknown one."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            return self._entries[name]

    def _unknown(self, name: str) -> AdapterError:
        names = sorted(self._entries)
        some = listed(names, most=20) or "none"
        return AdapterError(f"No adapter is called {name!r} (known: {some}){nearest(name, names)}.")
