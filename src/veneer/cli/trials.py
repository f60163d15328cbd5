"""The trials of a search, shown as they go; and the search before a run of `veneer tune`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from veneer.cli.console import ERRORS, OUTPUT, quieten_libraries, show_notice, silenced
from veneer.cli.events import events_on_stdout
from veneer.cli.tables import plan_summary
from veneer.errors import TrainingError, listed
from veneer.training.events import DataReady, Evaluated, Event, Notice, Planned, Started, Step
from veneer.training.recipe import Recipe
from veneer.training.search.result import (
    SearchBegun,
    TrialBegun,
    TrialEnded,
    TrialResult,
    ending,
)
from veneer.training.search.space import in_words


class SearchDisplay:
    """Shows a search: a bar for each trial on a terminal, a line for each that has ended."""

    def __init__(self) -> None:
        self.trials = self.ended = 0
        self.tasks: dict[str, TaskID] = {}
        self.titles: dict[str, str] = {}  # of the trials that train
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("evaluation loss {task.fields[loss]}"),
            console=OUTPUT,
            transient=True,
        )

    def __enter__(self) -> SearchDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.live.stop()  # its own stop() leaves an empty line in a log

    def show(self, name: str, event: Event) -> None:
        """Print what an event means, or move a bar."""
        match event:
            case Notice(text):
                show_notice(f"trial {int(name)}: {text}" if name else text, on=OUTPUT)
            case Planned(plan, free):
                OUTPUT.print(f"[bold]Plan[/]    {plan_summary(plan, free)}")
            case DataReady(summary, held_out):
                beside = f", {held_out.rows:,} held out" if held_out else ""
                OUTPUT.print(
                    f"[bold]Data[/]    {summary.rows:,} rows, {summary.tokens:,} tokens{beside}"
                )
            case SearchBegun(trials, ended):
                self.trials, self.ended = trials, ended
            case TrialBegun(trial):
                self.titles[name] = title(trial)
            case Started(steps, done) if OUTPUT.animates:
                self.tasks[name] = self.progress.add_task(
                    self.titles[name], total=steps, completed=done, loss="-"
                )
                self.progress.start()
            case Step(step) if name in self.tasks:
                self.progress.update(self.tasks[name], completed=step)
            case Evaluated(_, measured) if name in self.tasks:
                self.progress.update(self.tasks[name], loss=f"{measured:.4f}")
            case TrialEnded(trial):
                self.ended += 1
                if name in self.tasks:
                    self.progress.remove_task(self.tasks.pop(name))
                loss = "-" if trial.loss is None else f"{trial.loss:.4f}"
                OUTPUT.print(
                    f"  {title(trial)}: evaluation loss {loss}, {ending(trial)} "
                    f"({self.ended} of {self.trials})"
                )


def title(trial: TrialResult) -> str:
    """Return what a trial is called where it is shown."""
    return escape(f"trial {trial.number}: {in_words(trial.values)}")


def search_before(
    recipe: Recipe,
    names: Sequence[str],
    *,
    track: Sequence[str],
    quiet: bool,
    as_json: bool,
    grace_seconds: float | None = None,
    job: str = "",
    **options: Any,
) -> Recipe | int:
    """Search for settings that are left to it, show how, and return the run's recipe with them, or
    an exit code after Ctrl-C or SIGTERM.

    track: of the run alone. job: its name, where it is one of several. options: those of `tune`.
    """
    from veneer.cli.company import interruptible
    from veneer.training.search.auto import settle_by_search

    quieten_libraries()
    display = None if quiet else SearchDisplay()
    beside = {"job": job} if job else {}
    with (
        events_on_stdout(as_json) as write,
        interruptible(grace=grace_seconds) as asked,
        display or nullcontext(),
    ):
        if job and display:
            OUTPUT.print(f"[bold]Search[/]  {escape(job)}: {listed(names)}")
        events = settle_by_search(recipe, names, should_stop=asked, **options)
        while True:
            try:
                name, event = next(events)
            except StopIteration as end:
                return end.value
            except TrainingError:
                if asked.number:
                    place = escape(str(recipe.out))
                    ERRORS.print(f"Go on with the same command and --resume (results in {place}).")
                    return 128 + asked.number
                raise
            write(event, trial=name, **beside)
            if display:
                with silenced():
                    display.show(name, event)
