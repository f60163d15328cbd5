"""`veneer compare`: a table that fills as the jobs end, then the numbers and where they are."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from veneer.cli.console import ERRORS, OUTPUT, bytes_text, new_table, print_wide, show_notice
from veneer.cli.flags import Flat, Model, Switch, refuse_preset
from veneer.compare import run
from veneer.compare.config import CompareConfig
from veneer.compare.events import (
    ComparisonStarted,
    JobDone,
    JobFailed,
    JobPhase,
    JobStarted,
    JobStep,
)
from veneer.compare.job import Job
from veneer.compare.picture import PICTURE, draw
from veneer.compare.quality import TITLES
from veneer.compare.report import NUMBERS, TABLE, settings_line, write_report
from veneer.compare.summary import Comparison, Row
from veneer.errors import VeneerError
from veneer.training.events import Event, Notice


def compare(
    model: Model,
    data: Annotated[Path, Parameter(help="Rows to learn, in any form that veneer tune takes.")],
    /,
    *,
    settings: Annotated[CompareConfig, Flat] = CompareConfig(),
    out: Annotated[Path, Parameter(help="Directory for the results.")] = Path("dist/comparison"),
    resume: Annotated[
        Switch, Parameter(help="Go on: runs that ended in --out are not done again.")
    ] = False,
    force: Annotated[Switch, Parameter(help="Replace an earlier comparison in --out.")] = False,
    quiet: Annotated[Switch, Parameter(help="Print only errors.")] = False,
) -> int:
    """Return 0, 1 where runs failed, or 130 when the comparison was interrupted."""
    refuse_preset(model)
    display = None if quiet else CompareDisplay()
    events = run.compare(model, data, settings, out=out, resume=resume, force=force)
    try:
        with closing(events), display or nullcontext():
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    comparison: Comparison = end.value
                    break
                if display:
                    display.show(event)
    except KeyboardInterrupt:
        directory = escape(str(out))
        ERRORS.print(
            "\nInterrupted. Go on with the same command and --resume (what ended is in "
            f"{directory})."
        )
        return 130
    write_report(comparison, out)
    names = [TABLE, NUMBERS]
    (out / PICTURE).unlink(missing_ok=True)  # an earlier one, where this one cannot be drawn
    try:
        draw(comparison, out / PICTURE)
        names.append(PICTURE)
    except VeneerError as error:
        show_notice(str(error))
    if not quiet:
        _show(comparison)
        paths = ", ".join(escape(str(out / name)) for name in names)
        OUTPUT.print(f"[bold]Saved[/]   {paths}")
    for failure in chain.from_iterable(comparison.errors.values()):
        ERRORS.print(f"[bold red]Failed:[/] {escape(failure)}")
    return 1 if comparison.failed else 0


@dataclass
class _Line:
    """A run's line in the live table: what it is doing, and its newest numbers."""

    doing: str = "waiting"
    loss: str = ""
    speed: str = ""
    memory: str = ""
    eval_loss: str = ""
    quality: str = ""


class CompareDisplay:
    """Shows a comparison's events; use as a context, so that the live table is taken down."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        self.began = time.monotonic()
        self.live = Live(console=OUTPUT, transient=True, get_renderable=self._table)

    def __enter__(self) -> CompareDisplay:
        if OUTPUT.animates:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, event: Event) -> None:
        """Bring the table up to date, or print a line where there is no terminal."""
        match event:
            case ComparisonStarted(runs, seeds):
                self.lines = {name: _Line() for name in ("base", *runs)}
                of = f", {len(seeds)} seeds each" if len(seeds) > 1 else ""
                names = escape(", ".join(("base", *runs)))
                OUTPUT.print(f"[bold]Runs[/]    {names}{of}")
            case Notice(text):
                show_notice(text, on=OUTPUT)
            case JobStarted(job):
                self._line(job).doing = "starting"
                self._log(f"{job.name} ...")
            case JobPhase(job, doing):
                self._line(job).doing = f"{_stage(job)}{doing}"
            case JobStep(job, step, loss, speed, memory):
                line = self._line(job)
                line.doing = f"{_stage(job)}step {step}/{job.steps}"
                line.loss, line.speed = f"{loss:.3f}", f"{speed:,.0f}"
                line.memory = bytes_text(memory)
            case JobDone():
                self._done(event)
            case JobFailed(job, error):
                self._line(job).doing = "[red]failed[/]"
                self._log(f"{job.name} [red]failed[/]: {escape(error)}")
            case _:
                raise AssertionError(event)

    def _done(self, event: JobDone) -> None:
        job, result = event.job, event.result
        line = self._line(job)
        line.eval_loss = f"{result.eval_loss:.4f}"
        quality = result.bleu if result.bleu is not None else result.exact
        line.quality = "" if quality is None else f"{quality:.1f}"
        if result.tokens:
            line.speed = f"{result.tokens_per_second:,.0f}"
            line.loss = f"{result.train_loss:.3f}"
            line.memory = "" if result.peak is None else bytes_text(result.peak)
        line.doing = f"{_stage(job)}{'kept' if event.earlier else 'done'}"
        numbers = [f"evaluation loss {line.eval_loss}"]
        if line.quality:
            numbers.append(f"{'BLEU' if result.bleu is not None else 'exact match'} {line.quality}")
        if result.tokens:
            numbers.append(f"{line.speed} tokens/s, {line.memory}")
        ending = "kept from before" if event.earlier else "done"
        self._log(f"{job.name} {ending}: {', '.join(numbers)}")

    def _line(self, job: Job) -> _Line:
        return self.lines[job.label.run]

    def _log(self, text: str) -> None:
        if not OUTPUT.animates:
            OUTPUT.print(f"  {text}")

    def _table(self) -> Table:
        numbers = ("Loss", "tokens/s", "Memory", "Evaluation loss", "Quality")
        table = new_table("Method", "Now", *numbers)
        table.columns[1].justify, table.columns[1].min_width = "left", 24
        for name, line in self.lines.items():
            numbers = (line.loss, line.speed, line.memory, line.eval_loss, line.quality)
            table.add_row(escape(name), line.doing, *numbers)
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        table.caption = f"{minutes} min {seconds} s"
        return table


def _stage(job: Job) -> str:
    """Return what a job does for its line of the table."""
    if job.kind == "base":
        return ""
    if job.kind == "trial":
        return "timing: " if job.steps == run.TIMED else f"trying rate {job.lr:g}: "
    return f"seed {job.seed}: "


def _show(comparison: Comparison) -> None:
    OUTPUT.print(settings_line(comparison))
    print_wide(_result_table(comparison, "Method", comparison.rows))
    if comparison.swept:
        print_wide(_result_table(comparison, "LoRA", comparison.swept))


def _result_table(comparison: Comparison, first: str, rows: list[Row]) -> Table:
    """Return the numbers that fit on a terminal; all of them are in comparison.md."""
    quality = [TITLES[comparison.measure]] if comparison.measure else []
    titles = ("Trained", "Memory", "tokens/s", "Eval loss", *quality, "General", "On disk")
    table = new_table(first, *titles)
    for row in rows:
        shared = "shared" if row.together else ""
        numbers = [
            "" if row.trained is None else f"{row.trained:,}",
            shared if row.peak is None else bytes_text(row.peak),
            shared if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.eval_loss is None else row.eval_loss.text(4),
        ]
        if comparison.measure:
            numbers.append("" if row.quality is None else row.quality.text(1))
        numbers += [
            "" if row.forgotten is None else row.forgotten.text(4, signed=True),
            "" if row.kept is None else bytes_text(row.kept),
        ]
        if not row.seeds and row.errors:
            numbers[0] = "[red]failed[/]"
        table.add_row(escape(row.label.name), *numbers)
    return table
