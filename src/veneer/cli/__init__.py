"""The command line: it parses, prints and draws, and has no logic of its own."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence

# How often a thread that waits for others looks again before it sleeps. By default it is 300,000
# times: on x86 several milliseconds, which whatever else the machine has to do does not get. With
# 1,000 a lone training is slower (docs/performance.md has the measurements).
SPINS = "5000"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 2 for what the user can mend, 130 after Ctrl-C."""
    from veneer.processes.outcome import is_final, note_outcome, noted_outcome

    if (code := noted_outcome()) is not None:
        sys.exit(code)  # torchrun has started again what had no need of it
    from veneer.cli.app import run

    sleep_while_waiting()
    expand_segments()
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    if is_final(code):
        note_outcome(code)
    sys.exit(code)


def sleep_while_waiting() -> None:
    """Let threads that wait sleep soon, unless the user's environment says how they are to wait.

    GNU's OpenMP runtime, which torch brings on Linux and our kernels share, reads the environment
    once, when torch is imported. Results are the same to the bit. Only on x86 does the runtime
    pause the processor at each look, so that elsewhere its own number is soon over.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if platform.machine() in ("x86_64", "AMD64") and not chosen:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def expand_segments() -> None:
    """Let torch's memory of a GPU grow in place, unless the user's environment says how it is kept.

    Passes of other lengths leave holes between fixed segments, into which nothing fits. torch reads
    the environment once, at the latest when a GPU is first used.
    """
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if sys.platform == "linux" and not names & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
