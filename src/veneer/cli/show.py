"""`veneer.show`: a run as it goes, as a bar and curves in a notebook, and as lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from html import escape
from typing import Any

from veneer.cli.progress import RunDisplay
from veneer.training.events import Evaluated, Event, Notice, Started, Step, Verdict, Written

WIDTH, HEIGHT, MARGIN = 640, 220, 44  # of the curves, in pixels
PAUSE = 0.25  # seconds between two drawings, so that drawing takes no time from training
POINTS = 600  # of a curve, at most: more than that no screen shows


def show(events: Iterable[Event]) -> list[Event]:
    """Show what `veneer.train` or `veneer.tune` yields as it comes, and return all of it.

    In a Jupyter notebook it is one output that is drawn anew: a bar, the loss of steps and of
    evaluations, notices, and the verdict. Elsewhere it is what `veneer tune` prints. Raises what
    the run raises; what was shown by then stays.
    """
    notebook = _notebook()
    if notebook is None:
        with RunDisplay() as display:
            return [_passed(event, display.show) for event in events]
    curves = Curves()
    handle = notebook.display(notebook.HTML(curves.html()), display_id=True)
    drawn, seen = time.monotonic(), []
    try:
        for event in events:
            seen.append(event)
            curves.take(event)
            if time.monotonic() - drawn > PAUSE:
                handle.update(notebook.HTML(curves.html()))
                drawn = time.monotonic()
    finally:
        handle.update(notebook.HTML(curves.html()))
    return seen


def _passed(event: Event, display: Any) -> Event:
    display(event)
    return event


def _notebook() -> Any:
    """Return IPython's module for displaying where this runs in a notebook, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython import display

    return display


class Curves:
    """A run so far, as HTML without scripts."""

    def __init__(self) -> None:
        self.steps, self.last = 0, 0
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.lines: list[str] = []

    def take(self, event: Event) -> None:
        """Note what an event means for the picture."""
        match event:
            case Started(steps, done):
                self.steps, self.last = steps, done
            case Step(step, loss):
                self.last = step
                if math.isfinite(loss):
                    self.losses.append((step, loss))
            case Evaluated(step, loss, metrics=beside) if math.isfinite(loss) and (
                "reward" not in beside  # which has no place on the axis of losses
            ):
                self.evaluations.append((step, loss))
            case Notice(text):
                self.lines.append(f"note: {text}")
            case Verdict(kind, text):
                self.lines.append(f"{kind}: {text}")
            case Written(what, place):
                self.lines.append(f"saved {what}: {place}")

    def html(self) -> str:
        """Return the bar, the curves and the lines below them."""
        share = self.last / self.steps if self.steps else 0.0
        loss = f", loss {self.losses[-1][1]:.4f}" if self.losses else ""
        lines = "".join(f"<div>{escape(line)}</div>" for line in self.lines)
        return (
            f'<div style="max-width:{WIDTH}px">'
            f"<div>step {self.last} of {self.steps}{loss}</div>"
            '<div style="height:6px;border-radius:3px;background:#8884">'
            f'<div style="height:6px;border-radius:3px;width:{share:.1%};background:#3a7cb8"></div>'
            f"</div>{self._svg()}{lines}</div>"
        )

    def _svg(self) -> str:
        if not self.losses:
            return ""
        losses = [loss for _, loss in (*self.losses, *self.evaluations)]
        least, most = min(0.0, *losses), max(0.0, *losses)  # losses of samples may be below 0
        height = most - least or 1.0
        last = max(self.steps, self.last, 1)

        def point(step: int, loss: float) -> str:
            x = MARGIN + (WIDTH - MARGIN - 8) * step / last
            return f"{x:.1f},{HEIGHT - 24 - (HEIGHT - 40) * (loss - least) / height:.1f}"

        shown = self.losses[:: -(-len(self.losses) // POINTS)]
        steps = " ".join(point(*pair) for pair in shown)
        dots = "".join(
            f'<circle cx="{x}" cy="{y}" r="4" fill="#d1754f"/>'
            for x, y in (point(*pair).split(",") for pair in self.evaluations)
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="losses" '
            'style="width:100%" fill="currentColor" font-size="12">'
            f'<text x="0" y="20">{most:.2f}</text><text x="0" y="{HEIGHT - 24}">{least:.2f}</text>'
            f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last}</text>'
            f'<polyline points="{steps}" fill="none" stroke="#3a7cb8" stroke-width="2"/>'
            f"{dots}</svg>"
        )
