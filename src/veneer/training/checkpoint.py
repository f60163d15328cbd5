"""A training run's state on disk, from which it goes on to the bit."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.checksums import check_sums
from veneer.errors import AdapterError, TrainingError
from veneer.files import (
    new_directory,
    read_json,
    read_tensors,
    remove_directory,
    write_json,
    write_tensors,
)
from veneer.run_directory import STATE, TENSORS, checkpoint_steps


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that the next step depends on: tensors, and the plain numbers beside them.

    passed_over: why newer ones than this could not be read
    """

    step: int
    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    passed_over: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What decided the course of the run. Raises TrainingError where the file lacks it."""
        identity = self.progress.get("identity")
        if not isinstance(identity, dict):
            raise TrainingError(
                f"{_name(self.step)}/{STATE} does not say which run it belongs to: it has no "
                "'identity'. No run can go on from it; remove that checkpoint, or start anew with "
                "--force."
            )
        return identity


def write(checkpoint: Checkpoint, directory: Path, *, keep: Collection[int]) -> Path:
    """Write a checkpoint below `directory` and remove those that are neither it nor in `keep`.

    The older ones go only once the new one is on the disk.
    """
    place = directory / _name(checkpoint.step)
    if place.is_dir() and not (place / STATE).is_file():
        remove_directory(place)  # a damaged one of ours, by its name
    with new_directory(place, marker=STATE) as new:
        write_tensors(new / TENSORS, checkpoint.tensors)
        write_json(new / STATE, {"step": checkpoint.step, **checkpoint.progress})
    for step, older in checkpoint_steps(directory).items():
        if step not in {checkpoint.step, *keep}:
            remove_directory(older)
    return place


def read(place: Path) -> Checkpoint:
    """Read one checkpoint. Raises AdapterError if it is damaged, by its checksums too."""
    progress = read_json(place / STATE)
    if not isinstance(progress.get("step"), int):
        raise AdapterError(f"{place / STATE} does not say which step it holds.")
    checkpoint = Checkpoint(progress.pop("step"), read_tensors(place / TENSORS), progress)
    check_sums(place)
    return checkpoint


def newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint below `directory` that can be read, or None if there is none.

    Raises AdapterError if there are some, but all are damaged.
    """
    failures: list[AdapterError] = []
    for _, place in sorted(checkpoint_steps(directory).items(), reverse=True):
        try:
            return replace(read(place), passed_over=tuple(map(str, failures)))
        except AdapterError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return None


def last_good(directory: Path) -> Path | None:
    """Return the newest whole checkpoint below `directory` that was not saved between skipped
    steps."""
    for _, place in sorted(checkpoint_steps(directory).items(), reverse=True):
        with suppress(AdapterError):
            if not read(place).progress.get("skips"):
                return place
    return None


def remove_all(directory: Path) -> None:
    """Remove the checkpoints below `directory`, and nothing else that may lie there."""
    for place in checkpoint_steps(directory).values():
        remove_directory(place)


def _name(step: int) -> str:
    return f"step-{step:06d}"
