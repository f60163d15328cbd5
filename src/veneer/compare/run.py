"""A comparison from end to end: jobs one after another, each in a process of its own."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from veneer.compare.config import CompareConfig
from veneer.compare.events import ComparisonStarted, JobDone, JobFailed, JobStarted
from veneer.compare.job import RESULT, Job, Kind, Result, read_result
from veneer.compare.labels import BASE, Label
from veneer.compare.process import do_job, do_together
from veneer.compare.quality import Measure, measure_of
from veneer.compare.summary import Comparison
from veneer.data.questions import read_questions
from veneer.data.sources import files_of
from veneer.errors import Checks, ConfigError, VeneerError
from veneer.files import check_replaceable, check_writable, write_text
from veneer.training.events import Event, Notice

RUNS = "runs"
MARKER = "about.txt"  # by which a directory of runs is known to be one
ABOUT = "What the runs of `veneer compare` measured. --resume takes it from here.\n"
TIMED = 2 + 5  # steps of a trial that measures speed: to warm up, and to take the median of
RANGE = (1 / 3, 1.0, 3.0)  # learning rates that a range test tries, as multiples
SHORT = 10  # a trial of a range test takes the budget's steps divided by this


def compare(
    model: str,
    data: Path,
    config: CompareConfig,
    *,
    out: Path,
    resume: bool = False,
    force: bool = False,
) -> Generator[Event, None, Comparison]:
    """Do all jobs, yield what happens, and return what they measured, failures included.

    The results of finished jobs stay below `out`/runs: `resume` takes them from there, and `force`
    removes them. Raises VeneerError where nothing can be compared at all: data with problems, a
    base that cannot be loaded, runs of another comparison.
    """
    checks = Checks("Nothing can be compared")
    with checks.check():
        _check_directory(out, resume=resume, force=force)
    run = _Run(model, data, config, out / RUNS, checks)
    checks.end()
    yield ComparisonStarted(run.names, run.seeds)
    if resume and not run.runs.exists():
        yield Notice(f"{out} holds no earlier runs; all of them begin now")
    with nullcontext() if resume else _replaced(run.runs):
        write_text(run.runs / MARKER, ABOUT)
        base = yield from run.result(run.job("base", "base", BASE))
        if base is None:
            raise VeneerError(run.errors["base"][-1].removeprefix("base: "))
    run.base = base
    courses: dict[str, tuple[int, float] | None] = {}
    for seed in run.seeds:
        sharing: list[Job] = []
        for label in run.labels:
            if label.run not in courses:
                courses[label.run] = yield from run.course(label)
            if course := courses[label.run]:
                steps, lr = course
                job = run.job(
                    f"{label.run}-seed{seed}", "run", label, seed=seed, steps=steps, lr=lr
                )
                if config.together and label.trains_together:
                    sharing.append(job)
                elif result := (yield from run.result(job)):
                    run.results.setdefault(label.run, {})[seed] = result
        yield from run.train_together(sharing)
    return Comparison(
        model=model,
        data=data,
        config=config,
        measure=run.measure,
        base=base,
        courses={name: course for name, course in courses.items() if course},
        results=run.results,
        errors=run.errors,
        trials=run.trials,
    )


@dataclass
class _Run:
    """What stays the same from job to job, and what they have measured so far."""

    model: str
    data: Path
    config: CompareConfig
    runs: Path
    checks: InitVar[Checks]  # to which it adds what its files lack
    measure: Measure | None = None
    files: dict[str, str] = field(default_factory=dict)
    base: Result | None = None
    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    trials: dict[str, dict[float, float | None]] = field(default_factory=dict)

    def __post_init__(self, checks: Checks) -> None:
        config = self.config
        if (base := Path(self.model)).exists():
            self.files["model"] = _hash_of_states(base)
        for name, path in (("data", self.data), ("test", config.test), ("general", config.general)):
            with checks.check():
                if path is not None:
                    self.files[name] = _hash_of_rows(path)
                if name == "test" and path is not None:
                    questions = read_questions(path, limit=config.test_rows)
                    self.measure = measure_of(questions)
        # Labels that train alike share their runs.
        by_run: dict[str, Label] = {}
        for label in (*config.labels, *config.swept):
            by_run.setdefault(label.run, label)
        self.labels = tuple(by_run.values())
        self.names = tuple(label.run for label in self.labels)
        self.seeds = tuple(range(config.seed, config.seed + config.seeds))

    def job(
        self,
        name: str,
        kind: Kind,
        label: Label,
        *,
        seed: int | None = None,
        steps: int = 1,
        lr: float = 1.0,
    ) -> Job:
        config = self.config
        return Job(
            name=re.sub(r"[^\w.+]+", "-", name),
            kind=kind,
            label=label,
            model=self.model,
            data=str(self.data),
            test=None if config.test is None else str(config.test),
            general=None if config.general is None else str(config.general),
            files=self.files,
            test_rows=config.test_rows,
            max_new_tokens=config.max_new_tokens,
            eval_rows=config.eval_rows,
            limit=config.limit,
            max_length=config.max_length,
            tokens_per_step=self.base.tokens_per_step if self.base else config.tokens_per_step,
            # Once, for two measurements of what is faster may differ.
            device=config.device,
            dtype=self.base.dtype if self.base else config.dtype,
            split_seed=config.seed,
            seed=config.seed if seed is None else seed,
            steps=steps,
            lr=lr,
        )

    def course(self, label: Label) -> Generator[Event, None, tuple[int, float] | None]:
        """Return the steps of a label's runs and their learning rate, after trials where needed."""
        assert self.base is not None
        budget = self.config.allowed_of(self.base.steps)
        lr, seconds = self.config.rate_of(label, self.base.hidden_size), math.nan
        if budget.unit == "minutes":
            # Timed first, so that the learning rate reaches its end just when the time is over.
            job = self.job(f"{label.run}-timing", "trial", label, steps=TIMED, lr=lr)
            timing = yield from self.result(job)
            if timing is None:
                return None
            seconds = timing.seconds_a_step
        steps = budget.steps(tokens_a_step=self.base.tokens_a_step, seconds_a_step=seconds)
        if not self.config.range_test:
            return steps, lr
        short = max(1, steps // SHORT)
        losses: dict[float, float | None] = {}
        for factor in RANGE:
            rate = float(f"{lr * factor:.3g}")
            job = self.job(f"{label.run}-lr-{rate:g}", "trial", label, steps=short, lr=rate)
            if trial := (yield from self.result(job)):
                losses[rate] = trial.eval_loss if math.isfinite(trial.eval_loss) else None
        self.trials[label.run] = losses
        # None is the loss at a rate that diverged, which is not to be chosen.
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        return (steps, min(finite, key=finite.__getitem__)) if finite else None

    def result(self, job: Job) -> Generator[Event, None, Result | None]:
        """Return what a job measures, or measured earlier; None where it fails, which is noted."""
        earlier = read_result(self.runs / f"{job.name}{RESULT}", job)
        result: Result | str | None = earlier
        if result is None:
            yield JobStarted(job)
            result = yield from do_job(job, self.runs)
        return (yield from self._ended(job, result, earlier is not None))

    def train_together(self, jobs: Sequence[Job]) -> Generator[Event, None, None]:
        """Do jobs of which some were done earlier, the others in passes that they share."""
        results: dict[str, Result | str] = {}
        waiting = []
        for job in jobs:
            if (earlier := read_result(self.runs / f"{job.name}{RESULT}", job)) is None:
                waiting.append(job)
                yield JobStarted(job)
            else:
                results[job.name] = earlier
        if waiting:
            done = yield from do_together(waiting, self.runs)
            results |= {job.name: result for job, result in zip(waiting, done, strict=True)}
        for job in jobs:
            result = yield from self._ended(job, results[job.name], job not in waiting)
            if result:
                self.results.setdefault(job.label.run, {})[job.seed] = result

    def _ended(
        self, job: Job, result: Result | str, is_earlier: bool
    ) -> Generator[Event, None, Result | None]:
        """Note how a job has ended; of one that failed return None."""
        if isinstance(result, str):
            self.errors.setdefault(job.label.run, []).append(f"{job.name}: {result}")
            yield JobFailed(job, result)
            return None
        if self.base is not None and result.base != self.base.base:
            raise ConfigError(
                f"{job.name} has another base than the runs in {self.runs}. "
                "Start anew by --force or another --out."
            )
        yield JobDone(job, result, is_earlier)
        return result


def _check_directory(out: Path, *, resume: bool, force: bool) -> None:
    """Raise VeneerError where the runs may not be written to `out`."""
    runs = out / RUNS
    if out.is_file():
        raise ConfigError(f"{out} is a file, but --out must name a directory.")
    check_writable(out)
    check_replaceable(runs, marker=MARKER)
    if any(runs.glob(f"*{RESULT}")) and not (force or resume):
        raise ConfigError(
            f"{out} holds an earlier comparison. Go on with it by --resume, replace it by --force, "
            "or name another place by --out."
        )


@contextmanager
def _replaced(runs: Path) -> Iterator[None]:
    """Move earlier runs away, and remove them at the end; after an error they are moved back."""
    earlier = runs.with_name(f".{runs.name}.earlier")
    if runs.exists():
        runs.rename(earlier)
    try:
        yield
    except BaseException:
        if earlier.exists():
            shutil.rmtree(runs, ignore_errors=True)
            earlier.rename(runs)
        raise
    if earlier.exists():
        shutil.rmtree(earlier)


def _hash_of_rows(path: Path) -> str:
    """Return a short hash of what a file holds, or all files of rows in a directory."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _hash_of_states(path: Path) -> str:
    """Return a short hash of the sizes of a model's files and when they were last written."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    values = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
