"""Events for programs: one JSON object a line on standard output, and the words elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from veneer.cli.console import OUTPUT
from veneer.training.event_json import event_json
from veneer.training.events import Event


@contextmanager
def events_on_stdout(wanted: bool) -> Iterator[Callable[..., None]]:
    """Yield a function that prints an event, with further fields by name; in this context words go
    to standard error. Where that is not `wanted`, the function does nothing, and words stay."""
    if not wanted:
        yield lambda event, **beside: None
        return
    OUTPUT.stderr = True
    try:
        yield _write
    finally:
        OUTPUT.stderr = False


def _write(event: Event, **beside: str) -> None:
    try:
        print(json.dumps(beside | event_json(event), ensure_ascii=False), flush=True)
    except OSError:  # whoever read it is gone, which is no reason for a run to end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
