"""A training on a file system that is really full, at whatever size: one line says so, and the run
goes on where there is room again, to the bit."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from support.faults import (
    EXIT_CODES,
    POINTS,
    PROGRAM,
    is_temporary,
    paths_below,
    run_on,
    wrong_words,
)
from support.faulty_commands import RUN, commands
from support.file_trees import tree

ROOM = 2**30  # bytes
PAGE = os.sysconf("SC_PAGESIZE")  # by which such a file system is filled
DONE, _, TRY_AGAIN = EXIT_CODES


class SmallDisk:
    """A file system in memory, of so many bytes; skips the test where none can be mounted."""

    def __init__(self, place: Path, size: int) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        done = self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def grow(self) -> None:
        """Make space."""
        assert self._mount("-o", f"remount,size={ROOM}").returncode == 0

    def used(self) -> int:
        now = os.statvfs(self.place)
        return (now.f_blocks - now.f_bfree) * now.f_frsize

    def _mount(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [shutil.which("mount") or "false", *arguments, str(self.place)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[SmallDisk]:
    disk = SmallDisk(place, size)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class Training:
    """One training, on disks of several sizes, and what it leaves where there is room."""

    def __init__(self, inputs: Path, home: Path) -> None:
        self.command, self.place = commands(inputs)["tune"], home / "disk"
        with small_disk(self.place, ROOM) as disk:
            done = self._run(*self.command.arguments(self.place))
            assert done.returncode == DONE, done.stderr
            self.size, self.after = disk.used(), self.results()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_on(self.place, PROGRAM, *arguments)

    def results(self) -> list[dict[str, bytes]]:
        return [tree(self.place / name) for name in RUN]

    def on(self, size: int) -> tuple[int, bool]:
        """Train on a disk of `size` bytes though the plan says that it is too small, and where it
        was, go on with more; return how the first ended, and whether there was a checkpoint."""
        again = self.command.again
        assert again is not None
        with small_disk(self.place, size) as disk:
            done = self._run(*self.command.arguments(self.place), "--ignore-plan")
            where = f"{size:,} bytes: {done.stderr}"
            assert wrong_words(done.returncode, done.stderr, self.place) is None, where
            had = any(self.place.glob("out/checkpoints/step-*"))
            if done.returncode != DONE:
                disk.grow()
                more = self._run(*again(self.place))
                assert more.returncode == DONE, f"{where}\nthen {more.stderr}"
            assert self.results() == self.after, where
            assert not [name for name in paths_below(self.place) if is_temporary(name)], where
        return done.returncode, had


def test_a_disk_that_fills(inputs, tmp_path):
    training = Training(inputs, tmp_path)
    assert training.on(training.size // 2) == (TRY_AGAIN, True)


@pytest.mark.slow
def test_a_disk_of_every_size(inputs, tmp_path, record_property):
    training, ends = Training(inputs, tmp_path), Counter[tuple[int, bool]]()
    for size in count(PAGE, PAGE):
        end = training.on(size)
        ends[end] += 1
        if end[0] == DONE and size > training.size:
            break
    record_property(POINTS, {"command": "tune, full disk", "points": {"size": ends.total()}})
    assert ends[TRY_AGAIN, True] > ends[TRY_AGAIN, False] > 0, ends
