"""A run on the terminal: its data, its plan, a live bar, and where the results are."""

from __future__ import annotations

import time
from collections import deque

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from veneer.cli.console import OUTPUT, Pace, between_words, bytes_text, show_notice, show_saved
from veneer.cli.tables import merge_lines, plan_summary, quantized_summary, target_summary
from veneer.training.events import (
    Checkpointed,
    DataReady,
    Doing,
    Encoding,
    Evaluated,
    Event,
    Measured,
    Merged,
    ModelReady,
    Notice,
    Planned,
    Skipped,
    Space,
    Started,
    Step,
    Stopped,
    Trained,
    Verdict,
    Written,
)

LOST_MUCH = 0.01  # of all tokens; a larger share is shown in red
COLOURS = {"learnt": "green", "hardly learnt": "yellow", "overfitted": "yellow", "diverged": "red"}
SHOWN_EXAMPLE = 1200  # characters of the example that are shown
INDENT = " " * 4  # before each of its lines


class RunDisplay:
    """Shows events one by one; use as a context, so that the live bar is taken down."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("  step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(),
            console=OUTPUT,
            transient=True,
        )
        self.task: TaskID | None = None
        self.encoding: Progress | None = None  # the bar of rows that are encoded
        self.encodes = False  # whether a line of them was printed, where there is no bar
        self.pace = Pace()  # of lines where there is no bar
        self.steps = self.done = 0  # of the whole run, and before it went on
        self.recent: deque[Step] = deque(maxlen=20)
        self.verdict: Verdict | None = None
        self.evaluates = False
        self.began = time.monotonic()

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._take_down_encoding()
        self._take_down()
        if self.verdict:  # last, where it is seen
            label = f"[bold {COLOURS[self.verdict.kind]}]Verdict[/]"
            OUTPUT.print(f"{label} {escape(self.verdict.text)}")

    def show(self, event: Event) -> None:
        """Print what an event means, or move the bar."""
        match event:
            case Notice(text):
                show_notice(text, on=OUTPUT)
            case Planned(plan, free, processes):
                each = f", in each of {processes} processes" if processes > 1 else ""
                OUTPUT.print(f"[bold]Plan[/]    {plan_summary(plan, free)}{each}")
            case Space(needed, free):
                sizes = (f"{bytes_text(size)} for {what}" for what, size in needed.items())
                OUTPUT.print(
                    f"[bold]Disk[/]    {bytes_text(sum(needed.values()))} at most "
                    f"({', '.join(sizes)}), {bytes_text(free)} free"
                )
            case Measured(planned, peak):
                OUTPUT.print(
                    f"[bold]Memory[/]  at most {bytes_text(peak)}, {_beside(peak / planned)} "
                    f"planned ({bytes_text(planned)})"
                )
            case Encoding():
                self._encoding(event)
            case DataReady():
                self._take_down_encoding()
                self.evaluates = event.held_out is not None
                self._data(event)
            case ModelReady():
                summary = f"{target_summary(event.targets)}; {event.dtype}"
                OUTPUT.print(f"[bold]Model[/]   {summary}")
                if event.quantized:
                    OUTPUT.print(f"  {quantized_summary(event.quantized)}")
                if event.new_tokens:
                    texts = escape(", ".join(event.new_tokens))
                    OUTPUT.print(f"  {len(event.new_tokens)} new tokens: {texts}")
            case Started(steps, done):
                self._start(steps, done)
            case Step():
                self._step(event)
            case Evaluated(step, loss, perplexity, best, metrics):
                mark = ", the best so far" if best and step else ""
                when = f"step {step}" if step else "before training"
                what = f"loss {loss:.4f}"
                beside = {name.replace("_", " "): x for name, x in metrics.items()}
                if (reward := beside.pop("reward", None)) is not None:  # of answers to prompts
                    what = f"reward {reward:.4f}"
                if perplexity is not None:
                    beside = {"perplexity": perplexity}
                numbers = "".join(f", {escape(name)} {x:.2f}" for name, x in beside.items())
                OUTPUT.print(f"  {when}: evaluation {what}{numbers}{mark}")
            case Skipped(step, rows, why):
                OUTPUT.print(
                    f"  [red]step {step} skipped[/]: {why}; rows {escape(', '.join(rows[:8]))}"
                )
            case Stopped(step, reason):
                self._take_down()
                why = "no better evaluation" if reason == "patience" else "interrupted"
                OUTPUT.print(f"[bold]Stopped[/] after step {step}: {why}")
            case Verdict():
                self.verdict = event
            case Trained(step, best):
                self._take_down()
                took = _duration(time.monotonic() - self.began)
                whose = f"of step {best}" if best else "from before training"
                weights = "" if best == step else f"; the weights {whose} were best"
                before = f" ({self.done} before)" if self.done else ""
                diverged = self.verdict and self.verdict.kind == "diverged"
                what = "[red]Diverged[/] in" if diverged else "[bold]Trained[/]"
                OUTPUT.print(f"{what} {step - self.done} steps{before} in {took}{weights}")
            case Doing(what):
                OUTPUT.print(f"  {escape(what)} ...")
            case Merged(report):
                for line in merge_lines(report):
                    OUTPUT.print(f"[bold]Merged[/]  {line}")
            case Written(what, path):
                show_saved(path, what=what)
            case Checkpointed():
                pass
            case _:
                raise AssertionError(event)

    def _encoding(self, event: Encoding) -> None:
        """Move a bar, or print a line now and then where there is none."""
        size = f"{bytes_text(event.bytes)} of {bytes_text(event.total)}" if event.total else ""
        done = ", ".join(filter(None, [f"{event.rows:,} rows" if event.rows else "", size]))
        if event.waiting:
            done = "another run encodes these rows; waiting for it"
        if not OUTPUT.animates:
            if self.pace.due(anyway=not self.encodes):
                OUTPUT.print(f"  {event.what}: {done or 'beginning'}")
            self.encodes = True
            return
        if self.encoding is None:
            self.encoding = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
                TimeRemainingColumn(),
                console=OUTPUT,
                transient=True,
            )
            self.encoding.add_task(event.what, total=event.total, done="")
            self.encoding.start()
        (task,) = self.encoding.task_ids
        self.encoding.update(task, description=event.what, completed=event.bytes, done=done)

    def _take_down_encoding(self) -> None:
        if self.encoding is not None:
            self.encoding.stop()
            self.encoding = None

    def _data(self, event: DataReady) -> None:
        summary = event.summary
        counts = [
            f"{summary.rows:,} rows",
            f"{summary.tokens:,} tokens",
            f"{summary.label_tokens:,} of them trained",
            f"longest row {summary.longest:,}",
        ]
        if summary.lost:
            colour = "red" if summary.lost_share > LOST_MUCH else "yellow"
            causes = {
                "cut off": summary.truncated,
                "left out as too long": summary.dropped,
                "with turns behind the last answer": summary.unread,
            }
            rows = ", ".join(f"{count:,} {cause}" for cause, count in causes.items() if count)
            share = f"{summary.lost_share:.2%} of all tokens lost"
            counts.append(f"[{colour}]{share} (rows: {rows})[/]")
        if event.skipped:
            counts.append(f"[yellow]{event.skipped:,} bad rows left out[/]")
        if event.held_out:
            use = "to evaluate on" if event.eval_data else "held out"
            counts.append(f"{event.held_out.rows:,} rows {use}")
        OUTPUT.print(f"[bold]Data[/]    {', '.join(counts)}")
        coloured = OUTPUT.animates and not OUTPUT.no_color
        how = "[green]trained tokens in green[/]" if coloured else "trained tokens in >> <<"
        OUTPUT.print(f"  The first row as the model sees it, {how}:")
        example = Text()
        for piece, trained in event.example:
            text = f">>{piece}<<" if trained and not coloured else piece
            example.append(text, style="bold green" if trained else "dim")
        if len(example) > SHOWN_EXAMPLE:
            example = example[:SHOWN_EXAMPLE] + Text(" ...")
        example.rstrip()
        # A line is whole in a file, and none has blanks at its end.
        width = OUTPUT.width - len(INDENT) if OUTPUT.animates else len(example)
        for line in between_words(example, width).split():
            indented = Text(INDENT).append_text(line)
            indented.rstrip()
            OUTPUT.print(indented, soft_wrap=True)

    def _start(self, steps: int, done: int) -> None:
        self.steps, self.done, self.began = steps, done, time.monotonic()
        if done:
            OUTPUT.print(f"  going on after step {done} of {steps}")
        self.show(Doing("evaluating" if self.evaluates and not done else "training"))
        if OUTPUT.animates:
            self.task = self.progress.add_task(
                "", total=steps, completed=done, loss="loss -", speed="-", memory=""
            )
            self.progress.start()

    def _take_down(self) -> None:
        if self.task is not None:
            self.progress.stop()

    def _step(self, event: Step) -> None:
        self.recent.append(event)
        speed = sum(e.tokens for e in self.recent) / sum(e.seconds for e in self.recent)
        # The loss of samples says nothing: its gradient is what counts.
        reward = event.metrics.get("reward")
        what, value = ("loss", event.loss) if reward is None else ("reward", reward)
        if self.task is not None:
            self.progress.update(
                self.task,
                completed=event.step,
                loss=f"{what} {value:.3f}",
                speed=f"{speed:,.0f}",
                memory=bytes_text(event.rss_bytes),
            )
        elif self.pace.due(anyway=event.step in (self.done + 1, self.steps)):
            mean = sum(e.seconds for e in self.recent) / len(self.recent)
            left = _duration(mean * (self.steps - event.step))
            OUTPUT.print(
                f"  step {event.step}/{self.steps}  {what} {value:.3f}  {speed:,.0f} tokens/s  "
                f"{bytes_text(event.rss_bytes)}  {left} left"
            )
        if event.step == self.steps and self.evaluates:
            self.show(Doing("evaluating"))


def _beside(ratio: float) -> str:
    """Return how much more or less something is than what its ratio is to."""
    more = round(100 * (ratio - 1))
    return f"{abs(more)}% {'more' if more > 0 else 'less'} than" if more else "as"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
