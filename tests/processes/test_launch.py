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

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model
from veneer.run_directory import RunDirectory, checkpoint_steps

pytestmark = pytest.mark.slow

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

    def __init__(self, home: Path, out: str, *more: str, before: tuple[str, ...] = ()) -> None:
        self.directory = RunDirectory(home / out)
        self.errors = home / f"{out}-{time.monotonic_ns()}.txt"
        options = [word for name, value in COURSE.items() for word in (f"--{name}", str(value))]
        program = [sys.executable, "-m", *(before or ("veneer",))]
        command = [*program, "tune", "base", "rows.jsonl", "--out", out, *options, *more]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=home,
                stderr=errors,
                stdout=errors,
                env=os.environ | {"PYTHONPATH": OURS},
            )

    def wait_for(self, step: int) -> None:
        """Wait until the run has made a step."""
        while self.process.poll() is None and step not in {int(m["step"]) for m in self.metrics()}:
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Return the processes that compute, as the system knows them."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children.split()}
        return [pid for pid, command in commands.items() if "spawn_main" in command.read_text()]

    def end(self) -> int:
        code = self.process.wait()
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


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_an_error_is_said_once(by_torchrun: bool, home: Path) -> None:
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "veneer")
    ways = {"before": torchrun} if by_torchrun else {}
    own = () if by_torchrun else ("--processes", "2")
    command = Command(home, "refused", *own, "--targets", "no_such_layer", **ways)
    assert command.end() == (1 if by_torchrun else 2)  # torchrun's own for any failure
    errors = [line for line in command.text().splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "no_such_layer" in errors[0]
    assert by_torchrun or "Traceback" not in command.text()


def test_two_agents_with_a_rendezvous_are_as_one(home: Path, undisturbed: Command) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id")
    torchrun += ("v", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    torchrun += ("--local-addr", "127.0.0.1", "-m", "veneer")
    agents = [Command(home, "agents", before=torchrun) for _ in range(2)]
    assert [agent.end() for agent in agents] == [0, 0]
    assert_same_run(agents[0], undisturbed)
