"""A worker's share of the processors while answers are computed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

# Seconds, in which a process runs and is stopped once: about as long as a token takes.
PERIOD = 0.05
LOOK = 0.002  # seconds between looks at whether answers are computed
CAN_STOP = sys.platform == "linux"  # elsewhere a stopped process would outlive its server


class Pace:
    """Stops a process while `is_busy`, but for `share` of that time.

    A step of a training takes far longer than a token, so that waiting for its end would be felt;
    a stopped process leaves the processors at once.
    """

    def __init__(self, pid: int, is_busy: Callable[[], bool], share: float) -> None:
        self.pid, self.is_busy, self.share = pid, is_busy, share
        self._stopped = False

    def step(self) -> None:
        """Let the process run or stop for a moment, and return after it."""
        if self.share >= 1 or not CAN_STOP or not self.is_busy():
            self.free()
            time.sleep(LOOK)
            return
        # Stopped first, for an answer that has just been asked for.
        self._stop()
        time.sleep((1 - self.share) * PERIOD)
        if self.share > 0:
            self.free()
            time.sleep(self.share * PERIOD)

    def free(self) -> None:
        """Let the process run."""
        if self._stopped:
            self._send(signal.SIGCONT)
            self._stopped = False

    def _stop(self) -> None:
        if not self._stopped:
            self._send(signal.SIGSTOP)
            self._stopped = True

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)
