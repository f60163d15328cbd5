"""What is wrong with jobs, said at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veneer.errors import ConfigError, VeneerError


class JobProblems:
    """What is wrong with jobs, by their names."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, text: str) -> None:
        """Note a problem of a job."""
        self._lines.append(f"\n  - {name}: {text}")

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Note the error that ends this context as one of a job."""
        try:
            yield
        except (VeneerError, OSError) as error:
            self.add(name, str(error))

    def end(self) -> None:
        """Raise ConfigError where there are problems."""
        if self._lines:
            raise ConfigError(f"These jobs cannot begin:{''.join(self._lines)}")
