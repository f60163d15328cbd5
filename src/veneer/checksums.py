"""The checksums of a directory's files, in a list that `sha256sum -c` reads too.

Each directory that Veneer writes has one: of an adapter, a checkpoint, a merged or quantized model.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from veneer.errors import AdapterError, listed

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(directory: Path, *, coming: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the checksums of all files below a directory, as its list has them. coming: texts of
    files that are not there yet"""
    sums = {name: sum_of(directory / name) for name in _names(directory)}
    sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in coming.items()}
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read_sums(directory: Path) -> dict[str, str]:
    """Return the checksums of a directory by file, none where it has no list of them.

    Raises AdapterError for a damaged list.
    """
    place = directory / SUMS
    if not place.is_file():
        return {}
    try:
        matches = [_LINE.fullmatch(line) for line in place.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise AdapterError(f"{place} cannot be read ({error}).") from error
    sums = {match[2]: match[1] for match in matches if match}
    if not all(matches) or not all(map(_is_below, sums)):
        raise AdapterError(
            f"{place} is damaged: it must have a checksum, and a file below {directory}, on each "
            "line. Take another copy of it, or remove that list."
        )
    return sums


def problems_of(directory: Path, *, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what is wrong with the files of a directory, by file: missing, or not as written.

    only: endings of the files to look at, of all where there is none
    """
    problems: dict[str, str] = {}
    for name, expected in read_sums(directory).items():
        file = directory / name
        if only and not name.endswith(only):
            continue
        if not file.is_file():
            problems[name] = "missing"
        elif sum_of(file) != expected:
            problems[name] = "not as it was written (its checksum is another)"
    return problems


def unlisted(directory: Path) -> list[str]:
    """Return the files below a directory of which its list says nothing."""
    sums = read_sums(directory)
    return [name for name in _names(directory) if name not in sums]


def check_sums(directory: Path, *, only: tuple[str, ...] = ()) -> None:
    """Raise AdapterError, naming the files, where some are not as they were written. only: as in
    `problems_of`"""
    if problems := problems_of(directory, only=only):
        lines = listed(f"{name} is {why}" for name, why in problems.items())
        raise AdapterError(
            f"{directory} is damaged, or was changed: {lines}. Take another copy of it; or, if you "
            f"changed it on purpose, remove {directory / SUMS}."
        )


def _is_below(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in name.split("/")


def _names(directory: Path) -> list[str]:
    """Return the files below a directory but for the list, as the list has them."""
    return sorted(
        name
        for place, _, names in os.walk(directory)
        for file in names
        if (name := (Path(place) / file).relative_to(directory).as_posix()) != SUMS
    )
