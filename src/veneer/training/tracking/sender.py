"""A tracker at work in a thread of its own, so that a slow one never holds the run up."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Condition, Thread
from typing import Any

from veneer.training.tracking.tracker import Point, Tracker

MOST_WAITING = 10_000  # points that a tracker may be behind


class Sender:
    """Gives a tracker its calls one after another. `problem` says why it gets no more of them."""

    def __init__(self, tracker: Tracker, settings: Mapping[str, Any]) -> None:
        self.name = tracker.name
        self.problem = ""
        self._tracker, self._settings = tracker, settings
        self._points: list[Point] = []  # which wait for the tracker
        self._outcome = ""
        self._changed = Condition()
        # A daemon: the program's end does not wait for what hangs.
        self._thread = Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        """Let a point be sent when its turn comes."""
        with self._changed:
            if len(self._points) < MOST_WAITING:
                self._points.append(point)
                self._changed.notify()
            elif not self.problem:
                self.problem = f"it is {MOST_WAITING:,} points behind"

    def end(self, outcome: str) -> None:
        """Let the run end when all is sent."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until the run has ended there; what takes longer is a problem."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive() and not self.problem:
            self.problem = "it does not take the rest"

    def _work(self) -> None:
        try:
            self._tracker.begin(self._settings)
            while points := self._taken():
                self._tracker.log(points)
            self._tracker.end(self._outcome)
        except Exception as error:  # of foreign libraries, whatever they raise
            self.problem = str(error).strip().partition("\n")[0] or type(error).__name__

    def _taken(self) -> list[Point]:
        """Wait for points and return all that are there; none where the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._outcome)
            points, self._points = self._points, []
            return points
