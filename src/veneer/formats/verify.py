"""Whether what is on the disk is as it was written: adapters, checkpoints, models, whole runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.checksums import SUMS, problems_of, read_sums, unlisted
from veneer.errors import AdapterError, ConfigError
from veneer.files import is_leftover, read_tensors

TENSOR_FILES = (".safetensors", ".pt")
NO_TENSORS = ("optimizer.pt", "scheduler.pt", "scaler.pt")  # a Trainer's state, which holds more


@dataclass(frozen=True)
class Verified:
    """One directory: how many of its files have checksums, and what is wrong with which files.

    unlisted: files without a checksum; leftover: what a killed process has not finished to write
    """

    place: Path
    sums: int
    problems: dict[str, str]
    unlisted: tuple[str, ...] = ()
    leftover: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong, as far as that can be known."""
        return not self.problems


def verify(path: Path) -> Iterator[Verified]:
    """Yield every directory at or below a path that has checksums, or files of tensors.

    Files of tensors are read whole, too, and numbers in them that are not finite are problems.
    Raises ConfigError where there is nothing to verify.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; name that of an adapter, a model or a run.")
    seen = False
    for place, directories, names in os.walk(path, onerror=_stop):
        directories.sort()
        for name in [*filter(is_leftover, directories)]:
            directories.remove(name)
            yield Verified(Path(place) / name, 0, {}, leftover=True)
        if SUMS in names or any(map(_holds_tensors, names)):
            seen = True
            yield _verify(Path(place))
            if SUMS in names:
                directories.clear()  # their files are in the list
    if not seen:
        raise ConfigError(
            f"{path} holds nothing that can be verified: no {SUMS}, and no files of tensors."
        )


def _verify(place: Path) -> Verified:
    try:
        sums = read_sums(place)
        problems = problems_of(place)
        others = unlisted(place) if sums else ()
    except AdapterError as error:
        return Verified(place, 0, {SUMS: str(error)})
    for file in sorted(place.iterdir()):
        is_read = _holds_tensors(file.name) and file.name not in problems
        if is_read and (problem := _problem_of_tensors(file)):
            problems[file.name] = problem
    return Verified(place, len(sums), problems, tuple(others))


def _holds_tensors(name: str) -> bool:
    return name.endswith(TENSOR_FILES) and name not in NO_TENSORS


def _stop(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _problem_of_tensors(file: Path) -> str:
    """Return why a file of tensors cannot be used, or nothing where it can."""
    bad: list[str] = []
    try:
        for name, tensor in _tensors_of(file):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                bad.append(name)
    except (AdapterError, SafetensorError, OSError, RuntimeError) as error:
        return f"it cannot be read ({error})"
    if not bad:
        return ""
    more = f" and {len(bad) - 1} more" if bad[1:] else ""
    return f"numbers in {bad[0]}{more} are not finite"


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".pt":
        yield from read_tensors(file).items()
        return
    with safe_open(file, "pt") as opened:  # one at a time, for the file may be larger than memory
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            yield name, opened.get_tensor(name)
