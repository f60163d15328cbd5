"""One process of a run among others: signals, errors, and starting again."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from veneer.cli.console import (
    ERRORS,
    Terminal,
    show_error,
    show_notice,
    silence,
    warnings_as_notices,
)
from veneer.errors import VeneerError
from veneer.files import storage_error
from veneer.processes.start import Company, launch_id, restarts
from veneer.processes.world import LostProcess, World
from veneer.run_directory import RunDirectory

# torchrun passes on a signal that the terminal has sent to all processes; people are slower.
SAME_SIGNAL = 1.0  # seconds


def goes_on(world: World, directory: RunDirectory) -> bool:
    """Return whether an elastic agent has started processes again whose run had begun.

    Agents count for themselves: that of a new machine has started nothing again yet.
    """
    if not world.any(restarts() > 0):
        return False
    begun = world.first(lambda: directory.read_launch() == launch_id())
    if world.writes:
        how = ", and the run goes on from its newest checkpoint" if begun else ""
        show_notice(f"A process died. All are started again{how}.")
    return begun


def as_one(company: Company, run: Callable[[], int]) -> int:
    """Do a run's part in one of several processes, and return the exit code of the run.

    Of those in which it fails the first prints the error. Where another process has failed and is
    gone, this one ends with it, at once; and where it is gone without a word too, so that the
    elastic agent starts all again.
    """
    error: Exception | None = None
    try:
        with warnings_as_notices() if company.world.writes else warnings.catch_warnings():
            if not company.world.writes:
                warnings.simplefilter("ignore")
            code = run()
        if code:
            company.end(code)
        return code
    except LostProcess:
        if (ended := company.ended()) is None:
            os._exit(1)
        company.end(ended)
        os._exit(ended)
    except (VeneerError, OSError) as failure:
        error = storage_error(failure) or failure
        code = getattr(error, "exit_code", 2)
    except (KeyboardInterrupt, SystemExit) as signalled:
        status = signalled.code if isinstance(signalled, SystemExit) else 130
        assert isinstance(status, int)
        code = status
    except Exception as failure:
        error, code = failure, 1
    if company.end(code) and error is not None:
        if isinstance(error, VeneerError | OSError):
            show_error(error)
        else:
            traceback.print_exception(error)
    company.leave(code)
    return code


@contextmanager
def interruptible(*, shows: bool = True, grace: float | None = None) -> Iterator[Interrupt]:
    """In this context the first Ctrl-C, SIGTERM or SIGHUP asks the run to stop after a step; the
    second ends it.

    shows: whether this process says so
    grace: seconds after the first signal at which the run ends, whatever it is doing
    """
    asked = Interrupt(shows=shows, grace=grace)
    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup lets SIGHUP be ignored, and so it stays.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {n: signal.signal(n, asked.ask) for n in numbers}
    if grace is not None:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, asked.end)
    try:
        Terminal.goes_on = True
        yield asked
    finally:
        Terminal.goes_on = False
        if grace is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def show_stopping(number: int) -> None:
    """Print what a first signal brings about."""
    again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _say(f"\nStopping after this step, with a checkpoint ({again} again: at once) ...")


def _say(text: str) -> None:
    try:
        ERRORS.print(text)
    except OSError:  # the terminal is gone, as at SIGHUP
        silence()


class Interrupt:
    """Whether the run was asked to stop, and by which signal first."""

    def __init__(self, *, shows: bool = True, grace: float | None = None) -> None:
        self.number = 0
        self.shows = shows
        self.grace = grace
        self._since = 0.0

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if self.grace is not None:
                signal.setitimer(signal.ITIMER_REAL, max(self.grace, 1e-3))
            if self.shows:
                show_stopping(number)
            return
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < SAME_SIGNAL:
            return
        self._leave(number)

    def end(self, number: int, frame: FrameType | None = None) -> None:
        """End the run: the seconds of grace are over."""
        if self.shows:
            _say(
                f"Nothing more could be saved within {self.grace:g} s; the run goes on from its "
                "newest checkpoint with --resume."
            )
        self._leave(self.number)

    def _leave(self, number: int) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def __call__(self) -> bool:
        return self.number > 0
