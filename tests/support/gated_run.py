"""Runs `veneer` in this process and waits, before a step of training, until a signal has come: so
that a test sends it there, however busy the machine is.

    python -m support.gated_run STEP FILE tune ...

FILE is there once the run waits before this step.
"""

import os
import signal
import sys
from pathlib import Path

from veneer.cli import main
from veneer.training.run import Run


def gate(number: int, waits: Path) -> None:
    """Let the run wait before this step, counted from where it starts."""
    step, steps = Run._step, 0

    def gated(self: Run) -> object:
        nonlocal steps
        steps += 1
        if steps == number:
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)  # which a signal with a handler of Python's writes to
            waits.touch()
            os.read(read, 1)
            signal.set_wakeup_fd(-1)
        return step(self)

    Run._step = gated  # type: ignore[method-assign]


if __name__ == "__main__":
    gate(int(sys.argv[1]), Path(sys.argv[2]))
    sys.argv = ["veneer", *sys.argv[3:]]
    main()
