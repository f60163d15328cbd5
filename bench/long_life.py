"""Does what a long run and a busy server hold stay flat: memory, file descriptors, threads?

    python -m bench.long_life [--steps 5000] [--requests 20000] [--picture FILE.png]

Trains a small base with a checkpoint and an evaluation every 50 steps, and meanwhile serves it to
clients that ask what those of `bench.soak` ask, jobs beside them. Both are watched from outside.
The exit status is 1 where memory grows by more than 20 MB after the first fifth, where descriptors
or threads grow, or where an answer was wrong. Sockets come and go with clients: they count at rest,
before the first client and after the last.
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
from concurrent.futures import ThreadPoolExecutor
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
REST = 30.0  # seconds within which a server is rid of clients that have gone


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

    @property
    def descriptors(self) -> int:
        return self.held.others

    @property
    def threads(self) -> int:
        return self.held.threads


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
            before, after = (median(getattr(x, name) for x in each) for each in (early, late))
            print(f"  {name}: {before:g}, at the end {after:g}")
            if after - before > MORE:
                problems.append(f"{name} grew from {before:g} to {after:g}")
        return [*problems, *self.faults]


def _add(points: list[Point], point: Point, what: str) -> None:
    """Add a point, and now and then say how far it is."""
    if len(points) % 120 == 0:
        held = point.held
        print(
            f"{point.done:,} {what}: {point.memory / 1e6:.1f} MB, {held.descriptors} descriptors, "
            f"{held.sockets} of them sockets, {held.threads} threads",
            flush=True,
        )
    points.append(point)


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
                _add(points, Point(_steps(out / METRICS), held_by(process.pid)), "steps")
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
        before = _at_rest(server)
        load.beside(train_now_and_then)
        load.start()
        while (done := sum(load.findings.done.values())) < requests:
            if server.process.poll() is not None:
                break
            _add(points, Point(done, server.held(), Client(load.url).cache_bytes()), "requests")
            time.sleep(BETWEEN)
        load.end()
        faults = list(load.findings.faults[:10])
        if server.process.poll() is None:
            after = _at_rest(server)
            print(f"sockets at rest: {before}, at the end {after}")
            faults += [f"sockets at rest grew from {before} to {after}"] * (after > before)
    finally:
        ended = _ended(server)
    faults += ended
    faults += [f"{server.failures()} tracebacks in its log"] if server.failures() else []
    return Life("requests", points, faults)


def _at_rest(server: ServerProcess) -> int:
    """Return how many sockets a server holds when its clients have gone: the fewest within REST."""
    fewest, end = server.held().sockets, time.monotonic() + REST
    while time.monotonic() < end:
        time.sleep(BETWEEN)
        fewest = min(fewest, server.held().sockets)
    return fewest


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
            panel.plot(done, [getattr(point, name) for point in life.points], label=name)
        panel.set_xlabel(life.what)
        panel.locator_params(axis="x", nbins=4)
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
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor() as both:
        place = Path(home)
        base, rate, clients = place / "base", options.requests_per_second, options.clients
        write_base(base)
        started = []
        if options.steps:
            started.append(both.submit(train, base, place, options.steps))
        if options.requests:
            count = options.requests
            started.append(both.submit(serve, base, place, count, rate=rate, clients=clients))
        lives = [each.result() for each in started]
    if options.picture is not None:
        draw(lives, options.picture)
    problems = [f"{life.what}: {problem}" for life in lives for problem in life.problems]
    print(*(f"PROBLEM {problem}" for problem in problems), sep="\n", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
