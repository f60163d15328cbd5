"""Training runs as they go: metrics.jsonl, of which only what is new is read each time."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from veneer.run_directory import METRICS, RunDirectory
from veneer.serve.page.curve import Curve

RECENT = 20  # steps over which speed is measured, as on the terminal
QUIET_SECONDS = 60.0  # without a step for so long, and for five times a step, a run has stopped
MOST_RUNS = 200
# What progress.json says of a run's end, and what it is called.
STATES = {"finished": "finished", "patience": "finished", "interrupted": "stopped"}
# What of a recipe tells one run from another.
SETTINGS = ("model", "data", "method", "rank", "alpha", "targets", "lr", "epochs", "bits", "dora")


@dataclass
class Run:
    """What the lines of one metrics.jsonl say, up to where it was read."""

    identity: int = 0
    read: int = 0
    step: int = 0
    loss: float | None = None
    losses: Curve = field(default_factory=Curve)
    evaluations: Curve = field(default_factory=Curve)
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def take(self, line: dict[str, Any]) -> None:
        """Add one line: a step or an evaluation. What is no number has no place in a curve."""
        step = int(line["step"])
        if "eval_loss" in line:
            if math.isfinite(line["eval_loss"]):
                self.evaluations.add(step, float(line["eval_loss"]))
        elif math.isfinite(line["loss"]):
            self.step, self.loss = step, float(line["loss"])
            self.losses.add(step, self.loss)
            self.recent.append((int(line["tokens"]), float(line["seconds"])))

    def shown(self, changed: float, progress: dict[str, Any]) -> dict[str, Any]:
        """Return the run for the page; its file last `changed` so many seconds ago."""
        seconds = sum(each for _, each in self.recent)
        a_step = seconds / len(self.recent) if self.recent else 0.0
        steps, ended = progress.get("steps"), progress.get("ended")
        is_quiet = changed > max(QUIET_SECONDS, 5 * a_step)
        state = STATES.get(str(ended), "stopped" if is_quiet else "running")
        left = a_step * (steps - self.step) if isinstance(steps, int) else None
        return {
            "state": state,
            "step": self.step,
            "steps": steps,
            "loss": self.loss,
            "tokens_per_second": sum(n for n, _ in self.recent) / seconds if seconds else None,
            "seconds_left": left if state == "running" else None,
            "curve": self.losses.shown(),
            "evaluations": self.evaluations.shown(),
        }


class Runs:
    """The runs below a directory, which may come and go, start anew and be resumed."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._runs: dict[Path, Run] = {}
        self._lock = Lock()

    def shown(self) -> list[dict[str, Any]]:
        """Return all runs for the page, the one that changed last first."""
        found, now = [], time.time()
        with self._lock:
            for place, changed in self._newest():
                try:
                    run = self._follow(place)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # it went while we looked, or holds something else
                name = str(place.parent.relative_to(self.root))
                settings = settings_of(place.parent)
                shown = run.shown(now - changed, RunDirectory(place.parent).read_progress())
                found.append({"name": name, "settings": settings, **shown})
        return found

    def _newest(self) -> list[tuple[Path, float]]:
        places = [self.root / METRICS]
        for pattern in ("*", "*/*"):
            places += self.root.glob(f"{pattern}/{METRICS}")
        found = []
        for place in places:
            # A link may lead anywhere, and is not followed out of the root.
            if place.is_file() and place.resolve().is_relative_to(self.root):
                found.append((place, place.stat().st_mtime))
        found.sort(key=lambda each: -each[1])
        return found[:MOST_RUNS]

    def _follow(self, place: Path) -> Run:
        """Read what a file has more than at the last look; from its start where it is another."""
        run = self._runs.setdefault(place, Run())
        with place.open("rb") as file:
            status = place.stat()
            if status.st_ino != run.identity or status.st_size < run.read:
                run = self._runs[place] = Run(identity=status.st_ino)
            file.seek(run.read)
            new = file.read()
        whole = new.rfind(b"\n") + 1  # a last line without an end is still being written
        run.read += whole
        for line in new[:whole].splitlines():
            run.take(json.loads(line))
        return run


def follow_file(place: Path) -> Run:
    """Return what a whole metrics.jsonl says; nothing where there is none, or none of ours."""
    run = Run()
    try:
        for line in place.read_bytes().splitlines():
            run.take(json.loads(line))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return run


def settings_of(directory: Path) -> dict[str, Any]:
    """Return what a run's recipe says of it, or nothing where there is none."""
    recipe = RunDirectory(directory).read_recipe()
    return {name: recipe[name] for name in SETTINGS if recipe.get(name) is not None}
