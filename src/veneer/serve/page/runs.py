"""Training runs as they go: metrics.jsonl, of which only what is new is read each time."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import IO, Any

from veneer.errors import Missing, shortened
from veneer.run_directory import METRICS, RunDirectory
from veneer.serve.page.curve import Curve

RECENT = 20  # steps over which speed is measured, as on the terminal
PIECE = 2**20  # bytes of metrics that are read at once
QUIET_SECONDS = 60.0  # a run without a step for so long, and for five steps' time, has stopped
MOST_RUNS = 200
# How progress.json says that a run ended, and how the page says it.
STATES = {
    "finished": "finished",
    "diverged": "diverged",
    "patience": "finished",
    "interrupted": "stopped",
    "failed": "failed",
}
# Settings of a recipe by which a person tells runs apart.
SETTINGS = ("model", "data", "method", "rank", "alpha", "targets", "lr", "epochs", "bits", "dora")

NOT_COMPARED = ("out",)  # of a recipe: it says nothing of the training


@dataclass
class Run:
    """What the lines of one metrics.jsonl say, up to where it was read."""

    inode: int = 0
    read: int = 0  # bytes
    damaged: bool = False
    step: int = 0
    loss: float | None = None
    reward: float | None = None  # of a run on samples
    losses: Curve = field(default_factory=Curve)
    evaluations: Curve = field(default_factory=Curve)
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def take(self, lines: bytes) -> None:
        """Add lines: steps and evaluations. A line that is neither is passed over."""
        for text in lines.splitlines():
            try:
                self._take(json.loads(text))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                self.damaged = True

    def _take(self, line: dict[str, Any]) -> None:
        step = int(line["step"])
        if "eval_loss" in line:
            # A reward of held-out prompts has no place on the axis of losses.
            if math.isfinite(line["eval_loss"]) and "eval_reward" not in line:
                self.evaluations.add(step, float(line["eval_loss"]))
        elif math.isfinite(line["loss"]):
            tokens, seconds = int(line["tokens"]), float(line["seconds"])
            self.step, self.loss = step, float(line["loss"])
            self.losses.add(step, self.loss)
            reward = line.get("reward")
            self.reward = reward if isinstance(reward, float) and math.isfinite(reward) else None
            self.recent.append((tokens, seconds))

    def shown(self, quiet: float, progress: dict[str, Any]) -> dict[str, Any]:
        """Return the run for the page; quiet: seconds since its file changed."""
        seconds = sum(each for _, each in self.recent)
        a_step = seconds / len(self.recent) if self.recent else 0.0
        steps, ended = progress.get("steps"), progress.get("ended")
        is_quiet = quiet > max(QUIET_SECONDS, 5 * a_step)
        state = STATES.get(str(ended), "stopped" if is_quiet else "running")
        left = a_step * (steps - self.step) if isinstance(steps, int) else None
        texts = {name: progress.get(name) for name in ("verdict", "why")}
        return {
            "state": state,
            **{name: shortened(str(text), 400) if text else None for name, text in texts.items()},
            "step": self.step,
            "steps": steps,
            "loss": self.loss,
            "reward": self.reward,
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
        shown, now = [], time.time()
        with self._lock:
            newest = self._newest()
            kept = {metrics for _, metrics in newest}
            self._runs = {file: run for file, run in self._runs.items() if file in kept}
            for changed, metrics in newest:
                directory = metrics.parent
                try:
                    run = self._follow(metrics)
                except OSError:
                    continue  # it was removed meanwhile
                if run.damaged and not run.step:
                    continue  # a file of this name that is not ours
                name, settings = str(directory.relative_to(self.root)), settings_of(directory)
                progress = RunDirectory(directory).read_progress()
                shown.append(
                    {"name": name, "settings": settings, **run.shown(now - changed, progress)}
                )
        return shown

    def speed(self, model: str) -> float | None:
        """Return the tokens a second of the fastest run over a base, which had the machine most for
        itself; None where there is none."""
        speeds = [
            float(run["tokens_per_second"])
            for run in self.shown()
            if run["settings"].get("model") == model and run["tokens_per_second"]
        ]
        return max(speeds, default=None)

    def differences(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return each setting in which some runs differ, with its value in each of them, None where
        the recipe has none. Raises Missing."""
        places = {
            str(file.parent.relative_to(self.root)): file.parent for _, file in self._newest()
        }
        recipes = []
        for name in names:
            if name not in places:
                raise Missing(f"There is no run {name[:200]!r}.", param="run")
            recipes.append(RunDirectory(places[name]).read_recipe())
        settings = dict.fromkeys(name for recipe in recipes for name in recipe)
        rows = {name: [_in_words(recipe.get(name)) for recipe in recipes] for name in settings}
        return [
            {"setting": name, "values": values}
            for name, values in rows.items()
            if name not in NOT_COMPARED and len({*values}) > 1
        ]

    def _newest(self) -> list[tuple[float, Path]]:
        """Return the metrics files, each behind the time of its last change."""
        newest = []
        for pattern in (METRICS, f"*/{METRICS}", f"*/*/{METRICS}"):
            for file in self.root.glob(pattern):
                try:
                    # A link may lead anywhere, and is not followed out of the root.
                    if file.is_file() and file.resolve().is_relative_to(self.root):
                        newest.append((file.stat().st_mtime, file))
                except OSError:
                    continue  # it was removed meanwhile
        return sorted(newest, reverse=True)[:MOST_RUNS]

    def _follow(self, metrics: Path) -> Run:
        """Read what is new in a file since the last look; all of it where it is another file."""
        run = self._runs.setdefault(metrics, Run())
        with metrics.open("rb") as file:
            status = metrics.stat()
            if status.st_ino != run.inode or status.st_size < run.read:
                run = self._runs[metrics] = Run(inode=status.st_ino)
            file.seek(run.read)
            _take_on(run, file)
        return run


def follow_file(metrics: Path) -> Run:
    """Return what a whole metrics.jsonl says; nothing where there is none, or none of ours."""
    run = Run()
    with suppress(OSError), metrics.open("rb") as file:
        _take_on(run, file)
        run.take(file.read(PIECE))  # a last line without its end
    return run


def _take_on(run: Run, file: IO[bytes]) -> None:
    """Take whole lines from where a file stands to its end, a piece at a time. A last line without
    an end is still being written; one that is longer than a piece is none of ours."""
    while new := file.read(PIECE):
        whole = new.rfind(b"\n") + 1
        run.take(new[:whole])
        if not whole and len(new) == PIECE:
            run.damaged, whole = True, PIECE
        run.read += whole
        file.seek(run.read)
        if len(new) < PIECE:
            return


def settings_of(directory: Path) -> dict[str, Any]:
    """Return the settings that identify a run for a person; none where it has no recipe."""
    try:
        status = RunDirectory(directory).recipe.stat()
    except OSError:
        return {}
    # Parsing takes milliseconds, for each of many runs at each look, and recipes change rarely.
    return dict(_settings(directory, (status.st_ino, status.st_size, status.st_mtime_ns)))


@lru_cache(maxsize=2 * MOST_RUNS)
def _settings(directory: Path, changed: tuple[int, ...]) -> dict[str, Any]:
    """Return the settings of a recipe; changed: differs whenever its file does."""
    recipe = RunDirectory(directory).read_recipe()
    return {name: recipe[name] for name in SETTINGS if recipe.get(name) is not None}


def _in_words(value: Any) -> str | None:
    """Return a setting's value as short text, None for none."""
    if value is None:
        return None
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return shortened(value if isinstance(value, str) else json.dumps(value, default=str), 200)
