"""Every error that Veneer raises on purpose: one tree, each with a message for a person.

An error says what is wrong, where, and what to do. The command line prints it without a traceback
and exits with 2; a program catches `VeneerError`, or `ValueError` where the input was at fault.
"""

from __future__ import annotations

import errno
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class VeneerError(Exception):
    """Anything that Veneer refuses or cannot do. No full stop follows a suggestion's question mark,
    wherever in the message that is."""

    exit_code = 2  # of the command line

    def __init__(self, message: str = "") -> None:
        super().__init__(re.sub(r"(?<='\?)\.(?=\s|$)", "", message))


class ConfigError(VeneerError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class TargetError(VeneerError, ValueError):
    """A target, layer range or pattern matches nothing in the model."""


class ModelError(VeneerError, ValueError):
    """A base model cannot be found, read or used."""


class AdapterError(VeneerError, ValueError):
    """An adapter is damaged, of an unknown format, or belongs to another base."""


class MergeError(VeneerError, ValueError):
    """A merged model would lose more of what was learnt than is tolerated."""


class DataError(VeneerError, ValueError):
    """Training data has faults; `problems` holds one line for each."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


# Errors of the system at that moment: no file handle, no memory, a disk that does not answer.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO)


def passing_fault(error: BaseException | None) -> BaseException | None:
    """Return what is of the system at that moment, in an error and its causes, and not of what was
    read; None where there is no such thing."""
    while error is not None:
        is_short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if is_short or (isinstance(error, OSError) and error.errno in _PASSING):
            return error
        error = error.__cause__
    return None


def wrong_argument(value: object, expected: str) -> TypeError:
    """Return the error for an argument of a wrong type; `expected` says what should be there."""
    kind = type(value).__name__
    hint = "; pass its .model or its .tokenizer" if kind == "Base" else ""
    return TypeError(f"{expected} is expected here, not a {kind}{hint}.")


class VeneerWarning(UserWarning):
    """Something was done, but perhaps not what was meant; a run reports the same as a Notice."""


class VeneerDeprecation(VeneerWarning, FutureWarning):
    """A name works still, and will go (docs/versions.md)."""


@functools.cache  # so that each name is warned of once
def deprecated(name: str, *, since: str, use: str) -> None:
    """Warn that a name of Veneer's will go: since which version, and what takes its place.

    The line that is shown is the one that called the function which calls this.
    """
    message = f"{name} is deprecated since Veneer {since}; use {use} instead."
    warnings.warn(message, VeneerDeprecation, stacklevel=3)


class TrainingError(VeneerError, RuntimeError):
    """Training cannot go on; what was saved is kept."""


class DivergedError(TrainingError):
    """Loss or gradient ceased to be finite."""

    exit_code = 3


class StorageError(VeneerError, OSError):
    """A disk is full, or fails."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later


class RequestError(VeneerError, ValueError):
    """A request cannot be followed; `param` names the one parameter at fault, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(RequestError):
    """A request names a base or an adapter that is not served."""


class Missing(RequestError):
    """A request names a file or a job that is not here."""


class ContextExceeded(RequestError):
    """A prompt, or a prompt with its answer, is longer than the context."""


class QueueFull(VeneerError, RuntimeError):
    """Too many requests wait already; ask again later."""


# Problems that one message lists; a malicious file can have a million.
MOST_PROBLEMS = 50


def listed(items: Iterable[str], *, most: int = 3, between: str = ", ") -> str:
    """Return the first items, and how many more there are: "a, b, c, and 2 more"."""
    items = list(items)
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return between.join([*(shortened(item, 400) for item in items[:most]), *more])


def joined(problems: Iterable[str]) -> str:
    """Return problems as one line: "a; b; c", with the number of those beyond the first 50."""
    return listed(problems, most=MOST_PROBLEMS, between="; ")


class Checks:
    """Several checks of which each may fail, reported together."""

    def __init__(self, opening: str) -> None:
        self.opening = opening
        self.errors: list[VeneerError | OSError] = []

    @contextmanager
    def check(self) -> Iterator[None]:
        """In this context the first error ends the block, and is kept for the end."""
        try:
            yield
        except (VeneerError, OSError) as error:
            self.errors.append(error)

    def end(self) -> None:
        """Raise the only error as it is, or a ConfigError with a line for each of several."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = "".join(f"\n  - {error}" for error in self.errors)
            raise ConfigError(f"{self.opening}, for {len(self.errors)} reasons:{lines}")


def shortened(text: str, most: int = 200) -> str:
    """Return a text, or its first `most` characters and "..." where it is longer."""
    return text if len(text) <= most else f"{text[:most]}..."


def share_text(share: float) -> str:
    """Return a share in per cent; a small one is not said to be nothing."""
    text = f"{share:.2%}"
    return "less than 0.01%" if share > 0 and text == "0.00%" else text


def closest(name: str, names: Iterable[str], *, likeness: float = 0.5) -> str | None:
    """Return the one of `names` that is most like `name`, None where none is like it enough."""
    # The search takes the square of the length, and nobody mistypes so long a name.
    close = get_close_matches(name, list(names), n=1, cutoff=likeness) if len(name) <= 200 else []
    return close[0] if close else None


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the one of `names` that is most like `name`, or nothing."""
    close = closest(name, names)
    return f"; did you mean {close!r}?" if close else ""


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return "key (a there, b here)" for each setting in which two runs differ; "key (not the
    same)" where the values are hashes."""
    pairs = {key: (theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours})}
    return [
        f"{key} (not the same)"
        if _is_hashes(a)
        else f"{key} ({_value(key, a)} there, {_value(key, b)} here)"
        for key, (a, b) in pairs.items()
        if a != b
    ]


def _value(key: str, value: object) -> str:
    return "all" if value is None and key in ("layers", "limit") else repr(value)


def _is_hashes(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_hashes, value.values()))
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None
