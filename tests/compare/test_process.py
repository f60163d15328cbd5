"""A job's process ends with the process that started it, and its end is explained."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from support import warm
from support.comparison_jobs import ROWS, write_rows
from support.waiting import eventually
from veneer.compare.process import why


def begun(minigpt_home: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """Return a comparison that has begun to train, and would not end soon."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--methods", "lora", "--budget", "steps:100000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [warm.executable(), "-m", "veneer", "compare", str(minigpt_home), str(data), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "lora-seed0 ..." in line:
            break
    eventually(lambda: workers(tmp_path))
    return process


def test_ctrl_c_ends_the_worker_and_says_how_to_go_on(minigpt_home, tmp_path):
    process = begun(minigpt_home, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert {path.name for path in (tmp_path / "out" / "runs").glob("*.json")} == {"base.json"}
    eventually(lambda: not workers(tmp_path))


def test_a_worker_ends_with_the_process_that_started_it(minigpt_home, tmp_path):
    process = begun(minigpt_home, tmp_path)
    process.kill()
    process.communicate(timeout=120)
    eventually(lambda: not workers(tmp_path))


def workers(home: Path) -> list[bytes]:
    """Return the command lines of the processes that do jobs below `home`."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(file.read_bytes())
    return [line for line in commands if b"compare.worker" in line and str(home).encode() in line]


def test_a_process_that_ends_silently_is_explained(tmp_path):
    log = tmp_path / "lora.log"
    log.write_text("Traceback (most recent call last):\n  ...\nRuntimeError: no room\n\n")
    assert why(1, log) == f"RuntimeError: no room (all of it: {log})"
    assert "memory" in why(-signal.SIGKILL, log)
    assert "SIGSEGV" in why(-signal.SIGSEGV, log)
