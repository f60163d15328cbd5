"""`veneer compare` on the terminal: a table that fills as the jobs end, then where it is kept."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from veneer.cli.console import ERRORS, OUTPUT, bytes_text
from veneer.compare.config import CompareConfig
from veneer.compare.events import JobDone, JobFailed, JobPhase, JobStarted, JobStep, Laid
from veneer.compare.job import Job
from veneer.compare.picture import PICTURE, draw
from veneer.compare.quality import TITLES
from veneer.compare.report import NUMBERS, TABLE, settings_line, write_report
from veneer.compare.run import TIMED, compare
from veneer.compare.summary import Comparison, Row
from veneer.errors import VeneerError
from veneer.training.events import Event, Notice

WIDTH = 100  # columns of the tables where there is no terminal: in fewer, numbers would be broken


def run_compare(
    model: str,
    data: Path,
    config: CompareConfig,
    *,
    out: Path,
    resume: bool,
    force: bool,
    quiet: bool,
) -> int:
    """Run a comparison to its end and return the exit code: 0, 1 where runs failed, 130 when it
    was interrupted."""
    display = None if quiet else CompareDisplay()
    events = compare(model, data, config, out=out, resume=resume, force=force)
    try:
        with closing(events), display or nullcontext():
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    found: Comparison = end.value
                    break
                if display:
                    display.show(event)
    except KeyboardInterrupt:
        kept = escape(str(out))
        ERRORS.print(
            f"\nInterrupted. Go on with the same command and --resume (what ended is in {kept})."
        )
        return 130
    write_report(found, out)
    names = [TABLE, NUMBERS]
    (out / PICTURE).unlink(missing_ok=True)  # an earlier one, where this one cannot be drawn
    try:
        draw(found, out / PICTURE)
        names.append(PICTURE)
    except VeneerError as error:
        ERRORS.print(f"  note {escape(str(error))}")
    if not quiet:
        _print(found)
        places = ", ".join(escape(str(out / name)) for name in names)
        OUTPUT.print(f"[bold]Saved[/]   {places}", soft_wrap=True)
    for failure in chain.from_iterable(found.errors.values()):
        ERRORS.print(f"[bold red]Failed:[/] {escape(failure)}")
    return 1 if found.failed else 0


@dataclass
class _Line:
    """How a run stands: what it is doing, and its newest numbers."""

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
        if OUTPUT.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, event: Event) -> None:
        """Bring the table up to date, or print a line where there is no terminal."""
        match event:
            case Laid(runs, seeds):
                self.lines = {name: _Line() for name in ("base", *runs)}
                of = f", {len(seeds)} seeds each" if len(seeds) > 1 else ""
                names = escape(", ".join(("base", *runs)))
                OUTPUT.print(f"[bold]Runs[/]    {names}{of}", soft_wrap=True)
            case Notice(text):
                OUTPUT.print(f"  [yellow]note[/] {escape(text)}", soft_wrap=True)
            case JobStarted(job):
                self._line(job).doing = "starting"
                self._say(f"{job.name} ...")
            case JobPhase(job, doing):
                self._line(job).doing = f"{_part(job)}{doing}"
            case JobStep(job, step, loss, speed, memory):
                line = self._line(job)
                line.doing = f"{_part(job)}step {step}/{job.steps}"
                line.loss, line.speed = f"{loss:.3f}", f"{speed:,.0f}"
                line.memory = bytes_text(memory)
            case JobDone():
                self._done(event)
            case JobFailed(job, error):
                self._line(job).doing = "[red]failed[/]"
                self._say(f"{job.name} [red]failed[/]: {escape(error)}")
            case _:
                raise AssertionError(event)

    def _done(self, event: JobDone) -> None:
        job, found = event.job, event.result
        line = self._line(job)
        line.eval_loss = f"{found.eval_loss:.4f}"
        quality = found.bleu if found.bleu is not None else found.exact
        line.quality = "" if quality is None else f"{quality:.1f}"
        if found.tokens:
            line.speed = f"{found.tokens_per_second:,.0f}"
            line.loss = f"{found.train_loss:.3f}"
            line.memory = "" if found.peak is None else bytes_text(found.peak)
        line.doing = f"{_part(job)}{'kept' if event.kept else 'done'}"
        said = [f"evaluation loss {line.eval_loss}"]
        if line.quality:
            said.append(f"{'BLEU' if found.bleu is not None else 'exact match'} {line.quality}")
        if found.tokens:
            said.append(f"{line.speed} tokens/s, {line.memory}")
        self._say(f"{job.name} {'kept from before' if event.kept else 'done'}: {', '.join(said)}")

    def _line(self, job: Job) -> _Line:
        return self.lines[job.label.run]

    def _say(self, text: str) -> None:
        if not OUTPUT.is_terminal:
            OUTPUT.print(f"  {text}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("Method")
        table.add_column("Now", min_width=24)
        for title in ("Loss", "tokens/s", "Memory", "Evaluation loss", "Quality"):
            table.add_column(title, justify="right")
        for name, line in self.lines.items():
            numbers = (line.loss, line.speed, line.memory, line.eval_loss, line.quality)
            table.add_row(escape(name), line.doing, *numbers)
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        table.caption = f"{minutes} min {seconds} s"
        return table


def _part(job: Job) -> str:
    """Return which part of a row's work a job is."""
    if job.kind == "base":
        return ""
    if job.kind == "trial":
        return "timing: " if job.steps == TIMED else f"trying rate {job.lr:g}: "
    return f"seed {job.seed}: "


def _print(found: Comparison) -> None:
    OUTPUT.print(settings_line(found), soft_wrap=True)
    output = OUTPUT if OUTPUT.is_terminal else Console(highlight=False, width=WIDTH)
    output.print(_result_table(found, "Method", found.rows))
    if found.swept:
        output.print(_result_table(found, "LoRA", found.swept))


def _result_table(found: Comparison, first: str, rows: list[Row]) -> Table:
    """Return the numbers that fit on a terminal; all of them are in comparison.md."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(first)
    quality = [TITLES[found.measure]] if found.measure else []
    for title in ("Trained", "Memory", "tokens/s", "Eval loss", *quality, "General", "Kept"):
        table.add_column(title, justify="right")
    for row in rows:
        numbers = [
            "" if row.trained is None else f"{row.trained:,}",
            "" if row.peak is None else bytes_text(row.peak),
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.eval_loss is None else row.eval_loss.text(4),
        ]
        if found.measure:
            numbers.append("" if row.quality is None else row.quality.text(1))
        numbers += [
            "" if row.forgotten is None else row.forgotten.text(4, signed=True),
            "" if row.kept is None else bytes_text(row.kept),
        ]
        if not row.seeds and row.errors:
            numbers[0] = "[red]failed[/]"
        table.add_row(escape(row.label.name), *numbers)
    return table
