"""Spoilt and hostile files are refused by a typed error or load correctly, and never hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import endings, spoilt_files, warm

TESTS = Path(__file__).parents[1]
GROWTH = 256 * 2**20  # bytes; the files themselves have some thousand
# Of 2,000 files of each kind that the slow proof reads, what a normal run does.
FIRST = {"gguf": 20}


def in_a_process(python: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run a script of the tests in a process of its own and return its last line."""
    done = subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, sys.path), str(TESTS)])},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def read_spoilt(kind: str, first: int, count: int) -> dict[str, int]:
    """Read so many spoilt files and return how that ended; fail where one ended wrongly."""
    script = str(TESTS / "support" / "spoilt_files.py")
    report = json.loads(in_a_process(warm.executable(), script, kind, str(first), str(count)))
    shown = [f"seed {x['seed']}: {x['end']}\n{x['wrong']}" for x in report["faults"][:3]]
    assert not report["faults"], f"{len(report['faults'])} faults, such as:\n" + "\n".join(shown)
    assert report["grown"] < GROWTH
    assert sum(report["ends"].values()) == count
    return report["ends"]


@pytest.mark.parametrize("kind", spoilt_files.READERS)
def test_spoilt_files(kind):
    ends = read_spoilt(kind, 0, FIRST.get(kind, 50))
    # Neither all refused, for then nothing was read, nor all read, for then nothing was spoilt.
    assert ends.pop("loaded", 0) > 0
    assert sum(ends.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", spoilt_files.READERS)
def test_two_thousand_spoilt_files(kind):
    read_spoilt(kind, 0, 2000)


def test_a_reader_that_reads_wrongly_would_be_noticed(monkeypatch):
    # The harness itself: a crash, a wrong load, a hang and an error for want of memory are faults.
    def raising(error: BaseException | None):
        def read() -> None:
            if error is None:
                while True:
                    pass
            raise error

        return read

    import signal

    import veneer

    signal.signal(signal.SIGPROF, endings.stop)
    monkeypatch.setattr(endings, "SECONDS", 0.05)
    hungry = veneer.AdapterError("no")
    hungry.__cause__ = MemoryError()
    errors = (None, AssertionError("x"), KeyError("x"), hungry, veneer.AdapterError("no"))
    ends = [endings.ending(raising(error)) for error in errors]
    assert [end for end, _ in ends] == ["hang", "crash", "crash", "AdapterError", "AdapterError"]
    assert [wrong is None for _, wrong in ends] == [False, False, False, False, True]


def test_hostile_directories_run_and_import_nothing(tmp_path):
    script = str(TESTS / "support" / "hostile_directories.py")
    report = json.loads(in_a_process(warm.executable(), script, str(tmp_path), cwd=tmp_path))
    assert report.pop("imported") == []
    assert report.pop("sprung") is False
    for name, (end, seconds) in report.items():
        assert end.endswith("Error") or end == "loaded", (name, end)
        assert seconds < 1, name  # of the processor
    assert {"adapter with auto_map", "base with auto_map", "catastrophic targets"} <= set(report)
    assert report["adapter with auto_map"][0] == "AdapterError"  # no setting of PEFT's
    assert report["base of an unknown kind with auto_map"][0] == "ModelError"
    assert report["catastrophic targets"][0] == "AdapterError"


def test_a_pt_file_that_unpacks_to_more_than_it_holds(tmp_path):
    import zipfile

    import veneer
    from veneer.files import read_tensors

    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "wide.pt")
    with (
        zipfile.ZipFile(tmp_path / "wide.pt") as wide,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in wide.namelist():
            bomb.writestr(member, wide.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(veneer.AdapterError, match="compressed"):
        read_tensors(tmp_path / "bomb.pt")
    assert len(read_tensors(tmp_path / "wide.pt")["a"]) == 4_000_000
