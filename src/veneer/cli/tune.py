"""`veneer tune` on the terminal: show the run as it goes, then draw it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from rich.markup import escape

from veneer.cli.console import ERRORS, OUTPUT, quieten_libraries
from veneer.cli.plots import draw_losses
from veneer.cli.progress import RunDisplay
from veneer.errors import VeneerError
from veneer.run_directory import RunDirectory
from veneer.training.events import Evaluated, Event, Step, Stopped
from veneer.training.recipe import Recipe
from veneer.training.tune import tune


def run_tune(
    recipe: Recipe,
    *,
    resume: bool,
    force: bool,
    ignore_plan: bool,
    tensorboard: bool,
    quiet: bool,
) -> int:
    """Run a recipe to its end and return the exit code: 0, or 130 when it was interrupted."""
    quieten_libraries()
    display = None if quiet else RunDisplay()
    directory = RunDirectory(recipe.out)
    if display:
        OUTPUT.print(f"[bold]Base[/]    {escape(recipe.model)}")
    with interruptible() as asked, display or nullcontext():
        events = tune(
            recipe, resume=resume, force=force, ignore_plan=ignore_plan, should_stop=asked
        )
        for event in curves(events, directory.tensorboard) if tensorboard else events:
            if display:
                display.show(event)
            if isinstance(event, Stopped) and event.reason == "interrupted":
                out = escape(str(recipe.out))
                ERRORS.print(f"Go on with the same command and --resume (results in {out}).")
                return 130
    try:
        draw_losses(directory.read_metrics(), directory.picture)
    except VeneerError as error:
        ERRORS.print(f"  note {escape(str(error))}")
    return 0


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within, the first Ctrl-C only asks the run to stop at a good place; the second ends it."""
    asked = Interrupt()
    before = signal.signal(signal.SIGINT, asked.ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupt:
    """Whether a person has asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        ERRORS.print("\nStopping after this step, with a checkpoint (Ctrl-C again: at once) ...")

    def __call__(self) -> bool:
        return self.asked


def curves(events: Iterator[Event], directory: Path) -> Iterator[Event]:
    """Pass events on, writing their numbers for TensorBoard too.

    Raises VeneerError where TensorBoard, which comes with the extra `track`, is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise VeneerError("--tensorboard needs: pip install 'veneer[track]'") from error
    with SummaryWriter(str(directory)) as writer:
        for event in events:
            if isinstance(event, Step):
                writer.add_scalar("train/loss", event.loss, event.step)
                writer.add_scalar("train/learning_rate", event.lr, event.step)
                writer.add_scalar(
                    "speed/tokens_per_second", event.tokens / event.seconds, event.step
                )
                writer.add_scalar("memory/resident_bytes", event.rss_bytes, event.step)
            elif isinstance(event, Evaluated):
                writer.add_scalar("eval/loss", event.eval_loss, event.step)
            yield event
