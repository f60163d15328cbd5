"""What lies in a folder, and checks of what writing leaves there."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def on_disk_before_it_is_renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Check that whatever takes another name inside is on the disk by then, with all that is below
    it, and that the new name is brought there too. Yields the names taken so far.

    What is moved aside, or back, was there before: it is told by its name, which has .old- in it.
    """
    settled: dict[int, tuple[int, int]] = {}  # by inode, the state that is on the disk
    renamed_in: set[int] = set()  # directories whose new entries are not on the disk yet
    names: list[str] = []

    def state(status: os.stat_result) -> tuple[int, int]:
        return status.st_mtime_ns, status.st_size

    def fsync(handle: int) -> None:
        status = os.fstat(handle)
        settled[status.st_ino] = state(status)
        renamed_in.discard(status.st_ino)

    def watched(rename: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def watch(source: Any, target: Any) -> Any:
            if files.OLD not in f"{source}{target}":
                top = Path(source)
                for path in (top, *top.rglob("*")):
                    assert settled.get(path.stat().st_ino) == state(path.stat()), path
                renamed_in.add(Path(target).parent.stat().st_ino)
                names.append(Path(target).name)
            return rename(source, target)

        return watch

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", watched(os.rename))
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(files, "_exchange", watched(files._exchange))
        yield names
    assert names
    assert not renamed_in


def assert_whole_wherever_it_is_cut(
    write: Callable[[], Any],
    change: Callable[[], Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Write, change what is written, and break off writing it again at every possible moment: the
    old files stay, or the new ones are there as a whole."""
    with on_disk_before_it_is_renamed(monkeypatch):
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
