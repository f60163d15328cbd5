"""Does what a long run and a busy server hold stay flat: memory, file descriptors, threads?

    python -m bench.long_life [--steps 5000] [--requests 20000] [--picture FILE.png]

Trains a small base with a checkpoint and an evaluation every 50 steps, and then serves it to
clients that ask what those of `bench.soak` ask, jobs beside them. Both are watched from outside.
The exit status is 1 where memory grows by more than 20 MB after the first fifth, descriptors or
threads grow, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.island import rows as island_rows
from bench.soak import FLAGS, MORE, Load
from bench.soak_client import Client
from bench.soak_jobs import train_now_and_then
from bench.soak_server import Held, ServerProcess, held_by, write_adapters, write_base
from veneer.run_directory import METRICS

LEAK = 20e6  # bytes
EVERY = 50  # steps between two checkpoints, and between two evaluations
BETWEEN = 0.5  # seconds from one look to the next


@dataclass(frozen=True)
class Point:
    """What a process held when it had done so many steps or requests.

    cached: bytes of caches with a limit, which are meant to grow up to it
    """

    done: int
    held: Held
    cached: float = 0.0

    @property
    def memory(self) -> float:
        return self.held.memory - self.cached


@dataclass(frozen=True)
class Life:
    """What was held from beginning to end, and what else was wrong."""

    what: str
    points: Sequence[Point]
    faults: Sequence[str] = ()

    @property
    def problems(self) -> list[str]:
        """What grew, and what else was wrong."""
        end = self.points[-1].done
        early = [each for each in self.points if 0.2 * end <= each.done <= 0.35 * end]
        late = [each for each in self.points if each.done >= 0.85 * end]
        growth = median(x.memory for x in late) - median(x.memory for x in early)
        first, last = (median(x.memory for x in each) / 1e6 for each in (early, late))
        print(f"{self.what}: {end:,}; {first:.1f} MB after a fifth, {last:.1f} MB at the end")
        problems = [f"memory grew by {growth / 1e6:.1f} MB"] if growth > LEAK else []
        for name in ("descriptors", "threads"):
            before, after = (median(getattr(x.held, name) for x in each) for each in (early, late))
            print(f"  {name}: {before:g}, at the end {after:g}")
            if after - before > MORE:
                problems.append(f"{name} grew from {before:g} to {after:g}")
        return [*problems, *self.faults]


def train(base: Path, place: Path, steps: int) -> Life:
    """Train so many steps in a process of its own, and watch it."""
    rows, out, log = place / "rows.jsonl", place / "out", place / "tune.log"
    rows.write_text("".join(json.dumps(row) + "\n" for row in island_rows("qa", 400, seed=1)))
    command = [sys.executable, "-m", "veneer", "tune", str(base), str(rows), "--out", str(out)]
    command += ["--steps", str(steps), "--save-every", str(EVERY), "--eval-every", str(EVERY)]
    command += ["--eval-rows", "16", "--tokens-per-step", "256", "--rank", "2", "--quiet"]
    points: list[Point] = []
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        while process.poll() is None:
            with suppress(OSError):  # it ends meanwhile
                points.append(Point(_steps(out / METRICS), held_by(process.pid)))
            time.sleep(BETWEEN)
    faults = [f"tune exited with {process.returncode}:\n{log.read_text()[-2000:]}"]
    return Life("steps", points, faults if process.returncode else ())


def _steps(metrics: Path) -> int:
    """Return the step of the last line of a run's metrics, which may be half-written."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        steps = re.findall(rb'"step": (\d+)', file.read())
    return int(steps[-1]) if steps else 0


def serve(base: Path, place: Path, requests: int, *, rate: float, clients: int) -> Life:
    """Have so many requests answered by a server in a process of its own, and watch it."""
    write_adapters(str(base), place / "adapters")
    server = ServerProcess(str(base), place, *FLAGS, "--prefix-cache", str(place / "prefixes"))
    points: list[Point] = []
    try:
        load = Load(server.url, Client(server.url).base(), rate, clients)
        load.learn_answers()
        load.beside(train_now_and_then)
        load.start()
        while (done := sum(load.findings.done.values())) < requests:
            if server.process.poll() is not None:
                break
            points.append(Point(done, server.held(), Client(load.url).cache_bytes()))
            time.sleep(BETWEEN)
        load.end()
    finally:
        ended = _ended(server)
    faults = [*load.findings.faults[:10], *ended]
    faults += [f"{server.failures()} tracebacks in its log"] if server.failures() else []
    return Life("requests", points, faults)


def _ended(server: ServerProcess) -> list[str]:
    """End a server, and return what is wrong with how it ended."""
    try:
        status = server.stop()
    except subprocess.TimeoutExpired as error:
        server.process.kill()
        server.process.wait()
        return [f"the server had not ended after {error.timeout:g} s"]
    return [f"the server exited with {status}"] if status else []


def draw(lives: Sequence[Life], picture: Path) -> None:
    """Draw memory over steps and over requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(lives), figsize=(9, 3), squeeze=False)
    for panel, life in zip(panels[0], lives, strict=True):
        done = [point.done for point in life.points]
        panel.plot(done, [point.memory / 1e6 for point in life.points], label="memory, MB")
        for name in ("descriptors", "threads"):
            panel.plot(done, [getattr(point.held, name) for point in life.points], label=name)
        panel.set_xlabel(life.what)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--requests-per-second", type=float, default=40.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--picture", type=Path, help="a PNG with both curves")
    options = parser.parse_args(arguments)
    lives = []
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        write_base(place / "base")
        if options.steps:
            lives.append(train(place / "base", place, options.steps))
        if options.requests:
            rate, clients = options.requests_per_second, options.clients
            lives.append(serve(place / "base", place, options.requests, rate=rate, clients=clients))
    if options.picture is not None:
        draw(lives, options.picture)
    problems = [f"{life.what}: {problem}" for life in lives for problem in life.problems]
    print(*(f"PROBLEM {problem}" for problem in problems), sep="\n", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
