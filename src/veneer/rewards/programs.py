"""Unit tests as a reward: an answer's program with its row's tests, in a process with limits.

The limits keep a wrong program from taking the machine; they are no wall against a hostile one.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import regex

from veneer.rewards.judged import Answered, RewardFault

FENCED = regex.compile(r"```[^\n`]*\n(.*?)```", regex.DOTALL)
# Limits are set in the new process itself: code between fork and exec is unsafe beside threads.
LIMITED = """\
import os, resource, signal, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for what, most in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, 2**24), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (most, most))
signal.alarm(seconds + 1)  # where nobody is left who would end it
os.execv(sys.executable, [sys.executable, "-I", sys.argv[3]])
"""


@dataclass(frozen=True)
class PassesTests:
    """The share of a row's tests that an answer's program passes.

    The program is the answer's last fenced block, or all of it. A test is a text of Python that is
    run behind the program and passes where it comes to its end: a program that ends the process
    before has failed. seconds, memory (bytes): what one test may take; one that takes more has
    failed.
    """

    seconds: float = 10.0
    memory: int = 2**30
    name: str = "tests"

    def __call__(self, answer: Answered) -> float:
        if not answer.references:
            raise RewardFault("raised", "the row has no tests, which are its references.")
        program = program_of(answer.text)
        passed = [self._passes(f"{program}\n\n{test}\n") for test in answer.references]
        return sum(passed) / len(passed)

    def close(self) -> None:
        """There is nothing to end."""

    def _passes(self, text: str) -> bool:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            file = Path(directory) / "program.py"
            end = Path(directory) / secrets.token_hex()  # which is there once the test has ended
            text += f'__import__("pathlib").Path({str(end)!r}).touch()\n'
            file.write_text(text, encoding="utf-8", errors="replace")
            limits = (str(math.ceil(self.seconds)), str(self.memory), str(file))
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LIMITED, *limits],
                cwd=directory,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},  # each thread takes memory
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                return process.wait(self.seconds) == 0 and end.exists()
            except subprocess.TimeoutExpired:
                return False
            finally:
                with suppress(ProcessLookupError, PermissionError):  # of a group that has ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def program_of(answer: str) -> str:
    """Return an answer's last fenced block, or all of it where it has none."""
    blocks = FENCED.findall(answer)
    return blocks[-1] if blocks else answer
