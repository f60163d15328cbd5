"""Is a commit slower than the one before, on the same processor? A history of measurements, drawn.

python -m bench.history add --rounds 5 -- -m bench.training dense --engines veneer
python -m bench.history show --plot dist/history.png

Each line of bench/history.jsonl is one measurement: commit, time, processor, command, and the
figures of its rounds. `add` runs a command several times, each in a process of its own, and takes
the number behind --figure in what it prints, or else the seconds of the processor that it took
(--higher-is-better says which way is worse). A commit is called worse where its best round is worse
than the worst round of the commit before it: that is more than what chance does within one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from bench.__main__ import features

HISTORY = Path(__file__).parent / "history.jsonl"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measurement:
    """What a command took at a commit, a figure for each round."""

    commit: str
    time: str  # ISO 8601, UTC
    processor: str
    command: str
    figure: str  # what the rounds are of, such as "processor seconds"
    rounds: tuple[float, ...]
    higher_is_better: bool = False

    @property
    def series(self) -> tuple[str, str, str]:
        """What measurements share that may be compared."""
        return self.processor, self.command, self.figure


def processor() -> str:
    """Return this processor's name, its units for matrix products, threads and torch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores, {features()}"


def commit() -> str:
    """Return the commit that is checked out, with + where files other than the history differ."""
    named = subprocess.run(
        ["git", "describe", "--always", "--exclude=*"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    but = f":!{HISTORY.relative_to(ROOT)}"  # which `add` has changed before, at the same commit
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", but], cwd=ROOT)
    return named + "+" * bool(differs.returncode)


def measure(command: list[str], before_it: str | None) -> float:
    """Run a command, and return the number behind a text in its output, or processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if before_it is None:
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    match = re.search(rf"{re.escape(before_it)}\D*?(\d[\d,]*\.?\d*)", done.stdout)
    if match is None:
        sys.exit(
            f"{' '.join(command)} printed no number behind {before_it!r}:\n{done.stdout[-2000:]}"
        )
    return float(match[1].replace(",", ""))


def read(path: Path) -> list[Measurement]:
    """Return the measurements of a file in their order. Exits where a line is none."""
    measurements = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            measurements.append(Measurement(**{**values, "rounds": tuple(values["rounds"])}))
        except (ValueError, TypeError, KeyError) as error:
            sys.exit(f"{path}:{number} is no measurement: {error}")
    return measurements


def by_series(measurements: list[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Return the measurements that may be compared, each list in its order."""
    series = defaultdict(list)
    for measurement in measurements:
        series[measurement.series].append(measurement)
    return dict(series)


def slower(measurements: list[Measurement]) -> list[str]:
    """Return a line for each commit that is slower than the one before it beyond their noise."""
    lines = []
    for of_series in by_series(measurements).values():
        for before, after in pairwise(of_series):
            sign = -1 if after.higher_is_better else 1
            best, worst = min(sign * x for x in after.rounds), max(sign * x for x in before.rounds)
            if best > worst:
                ratio = statistics.median(after.rounds) / statistics.median(before.rounds)
                lines.append(
                    f"{after.commit} is worse than {before.commit}: {ratio:.3f} × {after.figure} "
                    f"of python {after.command} ({after.processor})"
                )
    return lines


def draw(measurements: list[Measurement], path: Path) -> None:
    """Draw each series: its rounds as points, their medians as a line, commit by commit."""
    from matplotlib.figure import Figure

    series = by_series(measurements)
    figure = Figure(figsize=(9, 3 * len(series)), layout="constrained")
    for axes, ((name, command, what), points) in zip(
        figure.subplots(len(series), squeeze=False)[:, 0], series.items(), strict=True
    ):
        for i, measurement in enumerate(points):
            axes.plot([i] * len(measurement.rounds), measurement.rounds, "o", color="0.6", ms=4)
        axes.plot([statistics.median(point.rounds) for point in points], "-o", color="C0")
        axes.set_xticks(range(len(points)), [point.commit for point in points], rotation=45)
        axes.set_ylabel(what)
        axes.set_title(f"{command}\n{name}", fontsize=8)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("add", "show"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figure", help="what stands before the number in what the command prints")
    parser.add_argument("--higher-is-better", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--file", type=Path, default=HISTORY)
    ours, command = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        ours, command = arguments[:at], arguments[at + 1 :]
    asked = parser.parse_args(ours)
    if (asked.action == "add") != bool(command):
        parser.error("add takes a command of python behind --, as in: add -- -m bench.planned")
    if asked.rounds < 1:
        parser.error("--rounds is at least 1")
    if command:
        measurement = Measurement(
            commit=commit(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            processor=processor(),
            command=" ".join(command),
            figure=asked.figure or "processor seconds",
            rounds=tuple(measure(command, asked.figure) for _ in range(asked.rounds)),
            higher_is_better=asked.higher_is_better,
        )
        with asked.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measurement)) + "\n")
    measurements = read(asked.file) if asked.file.exists() else []
    if not measurements:
        print(f"{asked.file} has no measurements yet.")
        return 0
    for (name, what, figure), points in by_series(measurements).items():
        print(f"python {what}: {figure} on {name}")
        for point in points:
            spread = f"{min(point.rounds):,.4g} to {max(point.rounds):,.4g}"
            print(f"  {point.commit:<10} {statistics.median(point.rounds):>10,.4g}  ({spread})")
    if asked.plot:
        draw(measurements, asked.plot)
        print(f"drawn: {asked.plot}")
    worse = slower(measurements)
    print("\n".join(worse) or "No commit is worse than the one before it beyond noise.")
    return bool(worse)


if __name__ == "__main__":
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))))
    sys.exit(main(sys.argv[1:]))
