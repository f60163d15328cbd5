"""What is wrong with jobs, said at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veneer.errors import ConfigError, VeneerError


class JobProblems:
    """What is wrong with jobs, by their names."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._errors: list[Exception] = []

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
            self._errors.append(error)

    def end(self) -> None:
        """Raise ConfigError where there are problems; its cause is the error of a job, where that
        is all there is."""
        if self._lines:
            only = self._errors[0] if len(self._lines) == len(self._errors) == 1 else None
            raise ConfigError(f"These jobs cannot begin:{''.join(self._lines)}") from only
