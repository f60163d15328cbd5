"""`veneer tune` in several processes: started, killed, interrupted, refused, and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import SHAPE, tiny, with_large_weights
from veneer.formats.merged import write_model
from veneer.run_directory import RunDirectory, checkpoint_steps

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).parents[1] / "support"
OURS = str(Path(veneer.__file__).parents[1])
STEPS, SAVED = 12, 3
COURSE = {"steps": STEPS, "save-every": SAVED, "tokens-per-step": 200, "eval-rows": 12}
COURSE |= {"eval-every": 4, "max-length": 60, "dtype": "float32", "dropout": 0.2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows for it."""
    place = tmp_path_factory.mktemp("home")
    write_model(tiny("llama"), tokenizer(), place / "base")
    pick = random.Random(0)
    texts = ["".join(pick.choices("abcdefgh ", k=pick.randint(8, 40))) for _ in range(120)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in texts))
    return place


class Command:
    """A run of `veneer tune` in a process of its own, and those that it starts."""

    def __init__(
        self,
        home: Path,
        out: str,
        *more: str,
        before: tuple[str, ...] = ("-m", "veneer"),
        base: str = "base",
    ) -> None:
        self.directory = RunDirectory(home / out)
        self.errors = home / f"{out}-{time.monotonic_ns()}.txt"
        options = [word for name, value in COURSE.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, *before, "tune", base, "rows.jsonl", "--out", out]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, *options, *more],
                cwd=home,
                stderr=errors,
                stdout=errors,
                env=os.environ | {"PYTHONPATH": OURS},
            )

    def wait_for(self, step: int) -> None:
        """Wait until the run has made a step."""
        while self.process.poll() is None and step not in {int(m["step"]) for m in self.metrics()}:
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Return the processes that this one has started, as Linux knows them."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def workers(self) -> list[int]:
        """Return the processes that compute."""
        commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in self.children()}
        return [pid for pid, command in commands.items() if "spawn_main" in command.read_text()]

    def end(self, timeout: float | None = None) -> int:
        """Return the exit code, for which to wait that many seconds at most."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in (*self.children(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            sys.stdout.write(self.text())
        return code

    def text(self) -> str:
        return self.errors.read_text()

    def metrics(self) -> list[dict[str, Any]]:
        lines = self.directory.read_metrics()
        return [{k: v for k, v in m.items() if k not in ("seconds", "rss_bytes")} for m in lines]

    def adapter(self) -> dict[str, torch.Tensor]:
        return torch.load(self.directory.adapter() / "lora_weights.pt", weights_only=True)


def assert_same_run(one: Command, other: Command) -> None:
    assert one.metrics() == other.metrics()
    ours, theirs = one.adapter(), other.adapter()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Command:
    command = Command(home, "undisturbed", "--processes", "4")
    assert command.end() == 0
    return command


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_run_goes_on_when_one_of_four_processes_is_killed(
    home: Path, undisturbed: Command
) -> None:
    command = Command(home, "killed", "--processes", "4")
    command.wait_for(5)
    os.kill(command.workers()[-1], signal.SIGKILL)
    assert command.end() == 0
    assert command.text().count("A process died. All are started again, and the run goes on") == 1
    assert "Traceback" not in command.text()
    assert_same_run(command, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_processes_with_a_checkpoint(
    number: signal.Signals, home: Path, undisturbed: Command
) -> None:
    command = Command(home, f"stopped-{number}", "--processes", "4")
    command.wait_for(5)
    command.process.send_signal(number)
    assert command.end() == 128 + number
    assert command.text().count("Stopping after this step") == 1
    assert command.text().count("Go on with the same command") == 1
    done = max(checkpoint_steps(command.directory.checkpoints))
    assert 5 <= done < STEPS
    resumed = Command(home, f"stopped-{number}", "--processes", "4", "--resume")
    assert resumed.end() == 0
    assert_same_run(resumed, undisturbed)


def torchrun(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", *options)


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_an_error_is_said_once(by_torchrun: bool, home: Path) -> None:
    options = ("--targets", "no_such_layer")
    if by_torchrun:  # which starts again whatever has failed
        before = torchrun("--max-restarts", "2", "-m", "veneer")
        command = Command(home, "refused", *options, before=before)
    else:
        command = Command(home, "refused", *options, "--processes", "2")
    assert command.end() == (1 if by_torchrun else 2)  # torchrun's own for any failure
    errors = [line for line in command.text().splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "no_such_layer" in errors[0]
    assert by_torchrun or "Traceback" not in command.text()


def test_a_wrong_flag_is_said_by_each_process_and_starts_nothing_again(home: Path) -> None:
    before = torchrun("--max-restarts", "2", "-m", "veneer")
    command = Command(home, "wrong", "--no-such-flag", "1", before=before)
    assert command.end() == 1
    assert 1 <= command.text().count("Error: Unknown option") <= 2


@pytest.mark.parametrize("by_torchrun", [False, True])
@pytest.mark.parametrize("way", [("--context-parallel", "2"), ("--shard", "base")])
def test_an_error_in_one_ends_those_that_wait_in_a_pass(
    way: tuple[str, str], by_torchrun: bool, home: Path
) -> None:
    program, out = str(PROGRAMS / "failing_pass.py"), f"fails{by_torchrun}{way[0]}"
    if by_torchrun:
        command = Command(home, out, *way, before=torchrun(program))
    else:
        command = Command(home, out, *way, "--processes", "2", before=(program,))
    assert command.end(timeout=120) == 1
    assert command.text().count("\nMemoryError: no memory is left") == 1
    assert not [line for line in command.text().splitlines() if line.startswith("Error:")]
    assert "started again" not in command.text()


def test_a_base_is_sharded_where_it_does_not_fit_whole(home: Path) -> None:
    torch.manual_seed(0)
    deep = LlamaConfig(**SHAPE | {"num_hidden_layers": 12})
    base = with_large_weights(AutoModelForCausalLM.from_config(deep))
    write_model(base, tokenizer(), home / "deep")
    ways = {"whole": ("-m", "veneer"), "auto": (str(PROGRAMS / "short_of_memory.py"),)}
    runs = {
        name: Command(home, name, "--processes", "2", before=before, base="deep")
        for name, before in ways.items()
    }
    assert [run.end() for run in runs.values()] == [0, 0]
    said = "The base is sharded: each of 2 processes holds its part of it."
    assert [said in " ".join(run.text().split()) for run in runs.values()] == [False, True]
    whole, auto = ([m["loss"] for m in run.metrics() if "loss" in m] for run in runs.values())
    assert len(whole) == STEPS
    assert auto == pytest.approx(whole, rel=1e-4)


def test_two_agents_with_a_rendezvous_are_as_one(home: Path, undisturbed: Command) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = ("--nnodes", "2", "--rdzv-id", "v", "--rdzv-backend", "c10d")
    machine += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")
    before = torchrun(*machine, "-m", "veneer")
    agents = [Command(home, "agents", before=before) for _ in range(2)]
    assert [agent.end() for agent in agents] == [0, 0]
    assert_same_run(agents[0], undisturbed)
