"""How a run ended, for processes that an elastic agent starts again though nothing can be mended by
that: torchrun does so after every error, as often as it may."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MISTAKE, SIGNALLED = 2, 128  # the first exit codes of errors for a person, and of signals


def is_final(code: int) -> bool:
    """Return whether a run that ended with an exit code would end with it again."""
    return MISTAKE <= code < SIGNALLED


def note_outcome(code: int) -> None:
    """Note that the run has ended with an exit code, where an elastic agent has begun this one."""
    if (file := _file()) is not None:
        with suppress(OSError):  # without it, whatever ended the run is met again
            file.write_text(str(code), encoding="ascii")


def noted_outcome() -> int | None:
    """Return the exit code with which the run has ended, None where no process of this machine that
    the same agent started has noted any."""
    file = _file()
    with suppress(OSError, ValueError):
        return None if file is None else int(file.read_text(encoding="ascii"))
    return None


def _file() -> Path | None:
    """Return the place of the note: in the directory where the agent looks for errors."""
    errors = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../attempt_0/RANK/error.json
    return errors.parents[2] / "veneer-outcome" if errors.name == "error.json" else None
