"""A run's directory has one owner at a time, and none that was killed."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer import run_lock
from veneer.errors import ConfigError, StorageError
from veneer.run_lock import LOCK, RunLock

KILLED = """
import os, sys
from pathlib import Path
from veneer.run_lock import RunLock
RunLock(Path(sys.argv[1])).take()
os._exit(9)
"""


def test_only_one_has_it(tmp_path):
    first, second = RunLock(tmp_path / "a" / "b"), RunLock(tmp_path / "a" / "b")
    assert first.take() == ""
    with pytest.raises(ConfigError, match=rf"another run \(process {os.getpid()} on .*, since"):
        second.take()
    with pytest.raises(ConfigError, match=rf"If that process is gone, .* remove \S+/{LOCK}\."):
        second.take()
    second.release()  # which has nothing
    assert (tmp_path / "a" / "b" / LOCK).exists()
    first.release()
    assert list(tmp_path.iterdir()) == []  # as it was before
    assert second.take() == ""
    (tmp_path / "a" / "b" / "x").write_text("")
    second.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_that_of_a_killed_process_is_free(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    lock = RunLock(tmp_path)
    assert "ended without a word (process" in lock.take()
    lock.release()


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("", True),
        ("{", True),
        ('{"pid": 999999999, "host": "HERE"}', True),
        ('{"pid": 1, "host": "HERE"}', False),
        ('{"pid": 1, "host": "elsewhere"}', False),
    ],
)
def test_without_locks_the_owner_is_asked_for(text, free, tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "HERE")
    (tmp_path / LOCK).write_text(text)
    lock = RunLock(tmp_path)
    if free:
        lock.take()
        lock.release()
    else:
        with pytest.raises(ConfigError, match="process 1 on"):
            lock.take()


@pytest.mark.parametrize("method", ["truncate", "write"])
def test_none_is_left_where_it_cannot_be_written(method, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    Full = type("Full", (io.TextIOWrapper,), {method: fails})
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Full(io.FileIO(path, "a+")))
    with pytest.raises(StorageError, match="disk is full"):
        RunLock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []
