"""What lies in a folder, and checks of what writing leaves there."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer import files


class Cut(Exception):
    """What breaks off the writing in these tests."""


def tree(place: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by path."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def assert_whole_wherever_it_is_cut(
    write: Callable[[], Any],
    change: Callable[[], Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Write, change what is written, and break off writing it again at every possible moment: the
    old files stay, or the new ones are there as a whole."""
    write()
    before, calls = tree(place), 0
    sync = files._sync

    # Every time something is brought to the disk is a moment at which the power may fail.
    def cut_at(moment: int) -> Callable[[Path], None]:
        def cut(path: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Cut
            sync(path)

        return cut

    change()
    for moment in range(1, 100):
        calls = 0
        monkeypatch.setattr(files, "_sync", cut_at(moment))
        try:
            write()
            break
        except Cut:
            now = tree(place)
            # From the rename on, the new one is there as a whole.
            assert now == before or calls == moment
            assert now.keys() == before.keys()
    assert moment > 3


def assert_modes_follow_the_umask(write: Callable[[], Any], place: Path) -> None:
    """Write under several umasks, and see that each file and folder has the mode of new ones."""
    for mask in (0o022, 0o077, 0o002):
        old = os.umask(mask)
        try:
            write()
        finally:
            assert os.umask(old) == mask
        paths = list(place.rglob("*"))
        assert paths
        for path in paths:
            mode = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
