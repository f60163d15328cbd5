"""One job in a process of its own, so that its memory is its own: python -m veneer.compare.worker.

Reads NAME.job.json, writes how it goes to its standard output, one JSON object a line, and leaves
NAME.json beside the job. Several jobs train together.
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

from veneer.compare.job import RESULT, Job, write_result
from veneer.errors import VeneerError


def main(arguments: Sequence[str]) -> int:
    """Do the job that a file describes, or those of several files together. Returns 1, having said
    why, where it cannot be done."""
    paths = [*map(Path, arguments)]
    jobs = [*map(Job.read, paths)]
    runs = paths[0].parent
    Thread(target=_end_with_parent, daemon=True).start()
    # The imports make millions of objects and no garbage: collecting takes a quarter of their time.
    gc.disable()
    from veneer.compare.measure import measure
    from veneer.compare.together import measure_together

    gc.enable()
    try:
        if len(jobs) == 1:
            results = iter([(jobs[0], measure(jobs[0], runs, _report))])
        else:
            results = measure_together(jobs, runs, _report)
        for job, result in results:
            write_result(runs / f"{job.name}{RESULT}", job, result)
    except VeneerError as error:
        _report({"error": str(error)})
        return 1
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
