"""`veneer tune` after Ctrl-C, SIGTERM or a kill: it goes on as if nothing had been."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import warm
from support.tuned_facts import FACTS, metrics, names, same_weights, write_rows
from support.waiting import eventually
from veneer.cli.app import run
from veneer.errors import ConfigError
from veneer.run_directory import RunDirectory
from veneer.run_lock import LOCK, RunLock

STEPS = 12
FLAGS = ("--steps", str(STEPS), "--save-every", "1", "--lr", "0.01", "--dropout", "0.1", "--quiet")


@pytest.fixture(scope="module")
def undisturbed(minigpt_home, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    data = write_rows(home / "facts.jsonl", FACTS)
    assert run(["tune", str(minigpt_home), str(data), "--out", str(home / "out"), *FLAGS]) == 0
    return home / "out"


def started(home: Path, data: Path, out: Path, *, before: int) -> subprocess.Popen:
    """Start the run as a process of its own, and come back when it waits before this step."""
    waits = out.with_name("waits")
    gated = [warm.executable(), "-m", "support.gated_run", str(before), str(waits)]
    process = subprocess.Popen(
        [*gated, "tune", str(home), str(data), "--out", str(out), *FLAGS],
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: waits.exists() or process.poll() is not None)
    return process


def wait_for_its_end(out: Path) -> None:
    """Wait until nobody holds the lock of a run whose launcher was killed."""
    lock = RunLock(out)
    while True:
        try:
            lock.take()
        except ConfigError:
            time.sleep(0.02)
        else:
            return lock.release()


def test_ctrl_c_saves_and_resume_ends_as_if_undisturbed(
    tune, minigpt_home, data, undisturbed, tmp_path
):
    out = tmp_path / "interrupted"
    process = started(minigpt_home, data, out, before=6)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert not (out / "lora_adapter").exists()
    place = max(names(out / "checkpoints"))
    assert place in ("step-000005", "step-000006")  # the one in which it came is made
    assert tune("--out", out, *FLAGS, "--resume") == 0
    assert same_weights(out, undisturbed)
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    progress, whole = (RunDirectory(place).read_progress() for place in (out, undisturbed))
    assert progress == whole
    assert "learnt: training loss" in whole["verdict"].lower()


def test_a_killed_run_resumes_to_the_bit(tune, minigpt_home, data, undisturbed, tmp_path):
    out = tmp_path / "killed"
    process = started(minigpt_home, data, out, before=6)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    wait_for_its_end(out)
    assert not (out / "lora_adapter").exists()
    assert tune("--out", out, *FLAGS, "--resume", "--recompute", "full") == 0
    assert same_weights(out, undisturbed)
    lines, whole = metrics(out), metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_the_second_ctrl_c_ends_at_once(tune, tmp_path, monkeypatch, capsys):
    from veneer.training.run import Run

    def interrupted_twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "_step", interrupted_twice)
    before = signal.getsignal(signal.SIGINT)
    assert tune("--out", tmp_path / "out", "--steps", 5) == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_too_and_have_their_own_code(
    number, tune, tmp_path, monkeypatch, capsys
):
    from veneer.training.run import Run

    step = Run._step

    def terminated(self):
        os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Run, "_step", terminated)
    before = signal.signal(number, signal.SIG_DFL)  # nohup, of the tests, lets it be ignored
    out = ("--out", tmp_path / "out", "--steps", 5)
    assert tune(*out, "--grace-seconds", 1000) == 128 + number
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert names(tmp_path / "out" / "checkpoints") == {"step-000001"}
    assert "--resume" in capsys.readouterr().err
    assert signal.signal(number, before) == signal.SIG_DFL
    assert run(["export", str(tmp_path / "out"), str(tmp_path / "there"), "--format", "peft"]) == 0
    assert "These are the weights of step 1 of 5;" in (tmp_path / "there/README.md").read_text()


def test_a_run_ends_when_its_time_of_grace_is_over(tune, tmp_path, monkeypatch, capsys):
    from veneer.training.run import Run

    step = Run._step

    def endless(self):
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGALRM)  # what the timer sends
        return step(self)

    monkeypatch.setattr(Run, "_step", endless)
    out = ("--out", tmp_path / "out", "--steps", 5, "--save-every", 1)
    with pytest.raises(SystemExit) as ended:
        tune(*out, "--grace-seconds", 1000)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "within 1000 s; the run goes on from its newest checkpoint" in " ".join(
        capsys.readouterr().err.split()
    )
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert names(tmp_path / "out" / "checkpoints") == {"step-000001", "step-000002"}
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_signal_after_the_training_leaves_the_adapter(tune, tmp_path, monkeypatch, capsys):
    from veneer.training import results

    merge, asked = results._merge, []

    def terminated(*arguments, **options):
        asked.append(arguments)
        return merge(*arguments, **options)

    save = results._save

    def saved(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from save(*arguments, **options)

    monkeypatch.setattr(results, "_save", saved)
    monkeypatch.setattr(results, "_merge", terminated)
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 128 + signal.SIGTERM
    assert not asked
    assert (out / "lora_adapter").is_dir()
    monkeypatch.setattr(results, "_save", save)
    assert tune("--out", out, "--steps", 2, "--resume") == 0
    assert (out / "lora_merged").is_dir()


def test_output_that_nobody_reads_ends_no_run(tune, tmp_path, monkeypatch):
    from veneer.cli import console, progress

    silenced = []

    def closed(self, event):
        raise BrokenPipeError

    monkeypatch.setattr(progress.RunDisplay, "_step", closed)
    monkeypatch.setattr(console, "silence", lambda: silenced.append(True))
    assert tune("--out", tmp_path / "out", "--steps", 2) == 0
    assert silenced
    assert LOCK not in names(tmp_path / "out")


def test_two_runs_do_not_write_into_one_directory(tune, tmp_path, capsys):
    lock = RunLock(tmp_path / "out")
    lock.take()
    try:
        assert tune("--out", tmp_path / "out", "--steps", 2) == 2
        assert f"(process {os.getpid()} on" in capsys.readouterr().err
        assert names(tmp_path / "out") == {LOCK}
    finally:
        lock.release()


PRINTS = """
import os, sys
from veneer.cli.company import interruptible
from veneer.cli.console import ERRORS, OUTPUT
os.write(2, b"ready\\n")
sys.stdin.readline()
with interruptible():
    for _ in range(2):
        OUTPUT.print("x" * 100_000)
    ERRORS.print("still here")
OUTPUT.print("x")
"""


def test_only_what_cannot_be_printed_is_silenced(tmp_path):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    process = subprocess.Popen(
        [warm.executable(), str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stdout is not None
    assert process.stderr.readline() == "ready\n"
    process.stdout.close()
    process.stdout = None
    _, complained = process.communicate("go\n")
    assert complained == "still here\n"
    assert process.returncode == 0
