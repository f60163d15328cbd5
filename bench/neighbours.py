"""Do two trainings on one machine get in each other's way? Steps alone and side by side, in turns.

python -m bench.neighbours steps --rounds 5
python -m bench.neighbours pretrain
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.cli import SPINS

ROWS, ROW_TOKENS = 4, 256
TORCH_SPINS = 300_000  # what GNU's OpenMP runtime takes where nothing is set
WARM_UP = 2  # steps of each process before any is counted


@dataclass(frozen=True)
class Course:
    """What a process did in one turn: when each of its steps ended, and what it cost in all."""

    started: float  # by the clock that all processes of the machine share
    ends: list[float]
    cpu_seconds: float  # of all threads, in the program and in the system for it

    def steps_until(self, moment: float) -> float:
        """Return how many steps were done by then; of the one under way, its share."""
        done = 0.0
        for begin, end in itertools.pairwise([self.started, *self.ends]):
            done += min(1.0, max(0.0, (moment - begin) / (end - begin)))
        return done


class Worker:
    """A training in a process of its own, which goes on for some seconds when told to."""

    def __init__(self, model: str, environment: dict[str, str], threads: int | None) -> None:
        command = [sys.executable, "-m", "bench.neighbours", "worker", "--model", model]
        command += ["--threads", str(threads)] if threads else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.end()  # of loading and warming up

    def begin(self, seconds: float) -> None:
        """Let it train for that long, to the end of the last step."""
        assert self.process.stdin
        print(seconds, file=self.process.stdin, flush=True)

    def end(self) -> Course:
        """Wait until it has stopped, and return what it did."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit("A training ended before its time; its error is above.")
        return Course(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def work(model: str) -> None:
    """Train, whenever a line with a number of seconds comes, for that long."""
    steps = _minigpt_steps() if model == "minigpt" else _adapter_steps(model)
    for _ in range(WARM_UP):
        next(steps)
    print(json.dumps({"started": 0, "ends": [], "cpu_seconds": 0}), flush=True)
    for line in sys.stdin:
        started, before, ends = time.monotonic(), _cpu_seconds(resource.RUSAGE_SELF), []
        while not ends or ends[-1] < started + float(line):
            next(steps)
            ends.append(time.monotonic())
        spent = _cpu_seconds(resource.RUSAGE_SELF) - before
        print(json.dumps({"started": started, "ends": ends, "cpu_seconds": spent}), flush=True)


def _adapter_steps(model: str) -> Iterator[None]:
    """Train an adapter of rank 8 on all linear layers, on random tokens, and yield at each step."""
    import numpy as np

    import veneer
    from veneer.cli.console import quieten_libraries
    from veneer.data.encode import Example
    from veneer.training.events import Step

    quieten_libraries()
    base = veneer.load_base(model, dtype="bf16")
    veneer.attach(base.model, veneer.LoRA(rank=8, targets="all"), seed=0)
    draw = np.random.default_rng(0)
    rows = draw.integers(0, base.model.config.vocab_size, (64, ROW_TOKENS)).tolist()
    examples = [Example(row, row, f"row {i}", 0) for i, row in enumerate(rows)]
    course = veneer.TrainConfig(steps=10**6, tokens_per_step=ROWS * ROW_TOKENS, lr=1e-4)
    for event in veneer.train(base.model, examples, course):
        if isinstance(event, Step):
            yield


def _minigpt_steps() -> Iterator[None]:
    """Train MiniGPT from nothing, and yield at each step."""
    import veneer
    from veneer.training.events import Step

    with tempfile.TemporaryDirectory() as scratch:
        for event in veneer.pretrain(Path(scratch, "minigpt"), steps=10**6):
            if isinstance(event, Step):
                yield


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Turn:
    """A turn of one training or of two: steps a second together, and what a step cost."""

    rate: float
    cpu_seconds: float  # a step


def turn(workers: list[Worker], seconds: float) -> Turn:
    """Let the workers train at the same time, and count while all of them do."""
    for worker in workers:
        worker.begin(seconds)
    courses = [worker.end() for worker in workers]
    begin = max(course.started for course in courses)
    end = min(course.ends[-1] for course in courses)
    done = sum(course.steps_until(end) - course.steps_until(begin) for course in courses)
    steps = sum(len(course.ends) for course in courses)
    return Turn(done / (end - begin), sum(course.cpu_seconds for course in courses) / steps)


def compare(asked: argparse.Namespace) -> str:
    """Return a table: each setting alone and beside itself, all settings in turns."""
    turns: dict[str, list[tuple[Turn, Turn]]] = {setting: [] for setting in asked.settings}
    with contextlib.ExitStack() as stack:
        pairs = {}
        for setting in asked.settings:
            environment, threads = _parsed(setting)
            pairs[setting] = [Worker(asked.model, environment, threads) for _ in range(2)]
            for worker in pairs[setting]:
                stack.callback(worker.close)
        for _ in range(asked.rounds):
            for setting, pair in pairs.items():
                turns[setting].append((turn(pair[:1], asked.seconds), turn(pair, asked.seconds)))
                print(setting, turns[setting][-1], file=sys.stderr, flush=True)
    lines = [
        "| setting | alone | CPU | two together | CPU | together / alone |",
        "|---|---|---|---|---|---|",
    ]
    for setting, pairs_of_turns in turns.items():
        alone, both = zip(*pairs_of_turns, strict=True)
        ratios = [b.rate / a.rate for a, b in pairs_of_turns]
        lines.append(
            f"| {setting} | {_spread([1e3 / t.rate for t in alone], 0)} ms a step "
            f"| {_spread([1e3 * t.cpu_seconds for t in alone], 0)} ms "
            f"| {_spread([1e3 / t.rate for t in both], 0)} ms a step "
            f"| {_spread([1e3 * t.cpu_seconds for t in both], 0)} ms "
            f"| {_spread(ratios, 2)} |"
        )
    return "\n".join(lines)


def _parsed(setting: str) -> tuple[dict[str, str], int | None]:
    """Return the environment and the threads of a setting, such as GOMP_SPINCOUNT=0,threads=1."""
    environment, threads = {}, None
    for pair in setting.split(","):
        name, _, value = pair.partition("=")
        if name == "threads":
            threads = int(value)
        elif value:
            environment[name] = value
    return environment, threads


def _spread(values: list[float], digits: int) -> str:
    """Return the median, and the lowest and the highest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def pretraining(asked: argparse.Namespace) -> str:
    """Return a table: `veneer pretrain` alone, and beside the training of an adapter."""
    lines = ["| `veneer pretrain` | seconds | CPU seconds |", "|---|---|---|"]
    spent: dict[str, list[tuple[float, float]]] = {"alone": [], "beside a training": []}
    worker = Worker(asked.model, {"GOMP_SPINCOUNT": SPINS}, None)
    try:
        for _ in range(asked.rounds):
            spent["alone"].append(_pretrain(asked.steps))
            worker.begin(3600)
            spent["beside a training"].append(_pretrain(asked.steps))
            worker.close()
            worker = Worker(asked.model, {"GOMP_SPINCOUNT": SPINS}, None)
    finally:
        worker.close()
    for place, runs in spent.items():
        wall, cpu = zip(*runs, strict=True)
        lines.append(f"| {place} | {_spread(list(wall), 0)} | {_spread(list(cpu), 0)} |")
    return "\n".join(lines)


def _pretrain(steps: int) -> tuple[float, float]:
    """Return the seconds of a pretraining from its command to its end, and those of its threads."""
    started, before = time.monotonic(), _cpu_seconds(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "veneer", "pretrain", f"{scratch}/minigpt"]
        subprocess.run([*command, "--steps", str(steps)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    return seconds, _cpu_seconds(resource.RUSAGE_CHILDREN) - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("steps", "pretrain", "worker"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=15, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of a pretraining")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[f"GOMP_SPINCOUNT={TORCH_SPINS}", f"GOMP_SPINCOUNT={SPINS}"],
        help="environments to compare, as NAME=VALUE,NAME=VALUE; threads=N is torch's number",
    )
    asked = parser.parse_args()
    if asked.what == "worker":
        if asked.threads:
            import torch

            from veneer.training import threads

            torch.set_num_threads(asked.threads)
            threads.WIDTH_OF_ONE_THREAD = 0  # whatever the model's width
        work(asked.model)
    else:
        print(compare(asked) if asked.what == "steps" else pretraining(asked))
