"""One job in a process of its own, so that its memory is its own: python -m veneer.compare.worker.

Reads NAME.job.json, writes how it goes to its standard output, one JSON object a line, and leaves
NAME.json beside the job.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from veneer.compare.job import JOB, RESULT, Job, write_result
from veneer.errors import VeneerError


def main(arguments: Sequence[str]) -> int:
    """Do the job that a file describes. Returns 1, having said why, where it cannot be done."""
    (path,) = map(Path, arguments)
    job = Job.read(path)
    Thread(target=_end_with_parent, daemon=True).start()
    # The imports make millions of objects and no garbage: collecting takes a quarter of their time.
    gc.disable()
    from veneer.compare.measure import measure

    gc.enable()
    try:
        result = measure(job, path.parent, _report)
    except VeneerError as error:
        _report({"error": str(error)})
        return 1
    write_result(path.with_name(path.name.removesuffix(JOB) + RESULT), job, result)
    return 0


def _report(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _end_with_parent() -> None:
    """End where the other end of standard input is closed, as it is when the parent ends."""
    # Not through sys.stdin, whose lock a thread would hold while the interpreter ends.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
