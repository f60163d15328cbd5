"""`veneer tune --jobs`: run several recipes over one base, and show them as they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

import veneer
from veneer.cli.company import interruptible
from veneer.cli.console import (
    ERRORS,
    OUTPUT,
    Pace,
    bytes_text,
    new_table,
    print_wide,
    quieten_libraries,
    show_notice,
    silenced,
)
from veneer.cli.events import events_on_stdout
from veneer.cli.plots import draw_losses
from veneer.cli.tables import plan_summary
from veneer.cli.trials import search_before
from veneer.errors import ConfigError, DivergedError, VeneerError, shortened
from veneer.run_directory import RunDirectory
from veneer.training.events import (
    DataReady,
    Evaluated,
    Event,
    Failed,
    Measured,
    Notice,
    Planned,
    Skipped,
    Started,
    Step,
    Stopped,
    Trained,
    Verdict,
    Written,
)
from veneer.training.many.problems import JobProblems
from veneer.training.recipe import Recipe

Events = Iterator[tuple[str, Event]]


def recipes_of(
    jobs: Mapping[str, Mapping[str, Any]], out: Path, recipe_of: Callable[..., Recipe]
) -> dict[str, Recipe]:
    """Return the recipe of each job, in a directory of its own.

    jobs: the arguments of tune for each. Raises ConfigError for all that are none, by their names.
    """
    taken = {*signature(recipe_of).parameters}
    recipes: dict[str, Recipe] = {}
    problems = JobProblems()
    for name, arguments in jobs.items():
        own = {key: value for key, value in arguments.items() if key in taken}
        with problems.of(name):
            recipes[name] = recipe_of(**{**own, "out": out / name})
    problems.end()
    return recipes


def run_jobs(
    recipes: Mapping[str, Recipe],
    out: Path,
    *,
    track: Sequence[str],
    quiet: bool,
    tokens_per_pass: int,
    as_json: bool = False,
    grace_seconds: float | None = None,
    searches: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> int:
    """Run all recipes and return the exit code: 0; 3 when one of them diverged, 2 when one failed
    otherwise; 128 and the number of the signal that ended it.

    searches: the settings of each job that a search settles before all begin. options: those of
    `tune_many`.
    """
    if track:
        raise ConfigError("--track is for a run alone; each job's metrics.jsonl has it all.")
    shows: dict[str, Any] = {"quiet": quiet, "as_json": as_json, "grace_seconds": grace_seconds}
    settled = dict(recipes)
    for name, names in (searches or {}).items():
        if not names:
            continue
        recipe = search_before(recipes[name], names, track=(), job=name, **shows, **options)
        if isinstance(recipe, int):
            return recipe
        settled[name] = recipe
    recipes, options["tokens_per_pass"] = settled, tokens_per_pass
    quieten_libraries()
    states = {name: JobState() for name in recipes}
    display = None if quiet else JobsDisplay(states)
    with (
        events_on_stdout(as_json) as write,
        interruptible(grace=grace_seconds) as asked,
        display or nullcontext(),
    ):
        for name, event in veneer.tune_many(recipes, should_stop=lambda _: asked(), **options):
            write(event, job=name)
            if name:
                states[name].take(event)
            if display:
                with silenced():
                    display.show(name, event)
            if isinstance(event, Failed):
                show_notice(f"{name} failed: {event.why}")
            if quiet and isinstance(event, Verdict) and event.kind == "diverged":
                show_notice(f"{name}: {event.text}")
            if isinstance(event, Written) and event.what == "adapter":
                run = RunDirectory(recipes[name].out)
                try:
                    draw_losses(run.read_metrics(), run.picture)
                except VeneerError as error:
                    show_notice(str(error))
        if display:
            show_results(states, out)
    if asked.number:
        ERRORS.print(f"Go on with the same command and --resume (results in {escape(str(out))}).")
        return 128 + asked.number
    return worst({state.exit_code for state in states.values()})


def worst(codes: set[int]) -> int:
    """Return the exit code of several jobs by theirs: a job that failed counts more than one that
    diverged, and a mistake more than a full disk."""
    diverged = DivergedError.exit_code
    return min(codes - {0, diverged}, default=diverged if diverged in codes else 0)


@dataclass
class JobState:
    """What is known of a job so far, for the table at the end."""

    steps: int = 0
    step: int = 0
    first: float | None = None
    last: float | None = None
    best: float | None = None
    ended: str = ""
    exit_code: int = 0

    def take(self, event: Event) -> None:
        """Take what an event says."""
        match event:
            case Started(steps, done):
                self.steps, self.step = steps, done
            case Step(step, loss):
                self.step, self.last = step, loss
                self.first = loss if self.first is None else self.first
            case Evaluated(_, loss, _, best) if best:
                self.best = loss
            case Stopped(_, reason) if reason == "interrupted":
                self.ended = "stopped"
            case Verdict(kind):
                self.ended = kind
                self.exit_code = DivergedError.exit_code if kind == "diverged" else 0
            case Failed(error):
                diverged = isinstance(error, DivergedError)
                self.ended = "diverged" if diverged else "failed"
                self.exit_code = getattr(error, "exit_code", 2)


class JobsDisplay:
    """Shows the events of several jobs: a bar for each on a terminal, some lines elsewhere."""

    def __init__(self, states: Mapping[str, JobState]) -> None:
        self.states = states
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, str] = {}  # by the text of a notice, the job that had it first
        self.paces: dict[str, Pace] = {}  # of each job's lines
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]}"),
            console=OUTPUT,
            transient=True,
        )

    def __enter__(self) -> JobsDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.live.stop()  # its own stop() leaves an empty line in a log

    def show(self, name: str, event: Event) -> None:
        """Print what an event means, or move a bar."""
        of = f"[bold]{escape(name)}[/]" if name else ""
        match event:
            case Notice(text):
                first = self.first.setdefault(text, name)
                if first and first != name:  # in full once
                    text = f"as {first}: {shortened(text, 60)}"
                show_notice(f"{name}: {text}" if name else text, on=OUTPUT)
            case Planned(plan, free):
                OUTPUT.print(f"[bold]Plan[/]    {plan_summary(plan, free)}")
            case Measured(planned, peak):
                OUTPUT.print(
                    f"[bold]Memory[/]  at most {bytes_text(peak)}, planned {bytes_text(planned)}"
                )
            case DataReady(summary, held_out):
                beside = f", {held_out.rows:,} held out" if held_out else ""
                rows = f"{summary.rows:,} rows, {summary.tokens:,} tokens{beside}"
                OUTPUT.print(f"[bold]Data[/]    {of}: {rows}")
            case Started(steps, done):
                if OUTPUT.animates:
                    self.tasks[name] = self.progress.add_task(
                        escape(name), total=steps, completed=done, loss="-"
                    )
                    self.progress.start()
                elif done:
                    OUTPUT.print(f"  {of}: going on after step {done} of {steps}")
            case Step(step, loss):
                self._step(name, step, loss)
            case Evaluated(step, loss, _, best):
                mark = ", the best so far" if best and step else ""
                when = f"step {step}" if step else "before training"
                OUTPUT.print(f"  {of}: {when}: evaluation loss {loss:.4f}{mark}")
            case Skipped(step, _, why):
                OUTPUT.print(f"  {of}: [red]step {step} skipped[/]: {why}")
            case Stopped(step, reason):
                why = "no better evaluation" if reason == "patience" else "interrupted"
                OUTPUT.print(f"  {of}: stopped after step {step}: {why}")
            case Trained() | Failed() if name in self.tasks:
                self.progress.remove_task(self.tasks.pop(name))
            case Verdict(_, text):
                OUTPUT.print(f"  {of}: {escape(text)}")

    def _step(self, name: str, step: int, loss: float) -> None:
        if name in self.tasks:
            self.progress.update(self.tasks[name], completed=step, loss=f"{loss:.3f}")
            return
        steps = self.states[name].steps
        if self.paces.setdefault(name, Pace()).due(anyway=step == steps):
            OUTPUT.print(f"  {escape(name)}: step {step}/{steps}  loss {loss:.3f}")


def show_results(states: Mapping[str, JobState], out: Path) -> None:
    """Print a line for each job: how far it came, its losses, and what became of it."""
    table = new_table("job", "steps", "loss at first", "at last", "best evaluation", "verdict")
    for name, state in states.items():
        losses = [
            "-" if loss is None else f"{loss:.4f}" for loss in (state.first, state.last, state.best)
        ]
        table.add_row(escape(name), f"{state.step}/{state.steps}", *losses, state.ended or "-")
    print_wide(table)
    OUTPUT.print(f"[bold]Saved[/]   below {escape(str(out))}")
