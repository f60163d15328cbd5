"""How long a chat template may compute, and what it may grow to: it comes with a base, from anyone.

jinja2's sandbox keeps a template from files and from Python's inside, but lets it loop for ever. So
a thread looks each second at the templates that are being rendered, and raises an error in those
that have computed for too long or have taken too much memory. What no thread can break off, powers
and products of large numbers, is refused before.
"""

from __future__ import annotations

import ast
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, TemplateError

from veneer.errors import DataError

SECONDS = 10.0  # of the processor, for one conversation; an ordinary one takes some thousandths
BYTES = 2**30  # that the process may grow meanwhile
INTERVAL = 1.0  # seconds between two looks
LARGEST = 1_000_000  # a number in a template; it may be a factor of a text
LONGEST = 100  # characters of a number


class _TooMuch(BaseException):
    """What ends a template that takes too much: no filter or test of jinja2's catches it."""


@dataclass(eq=False)
class _Rendering:
    thread: int
    seconds: float  # of the thread, when it began
    bytes: int  # of the process, when it was first looked at; 0 before
    is_ended: bool = False


_lock = threading.Lock()
_now: dict[int, _Rendering] = {}
_watcher: threading.Thread | None = None


def _forget() -> None:
    """Begin anew in a fork, which has no thread but its own, and perhaps a lock that one held."""
    global _lock, _watcher
    _lock, _watcher = threading.Lock(), None
    _now.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@lru_cache
def check_template(template: str) -> None:
    """Raise DataError for a template with a power, or with a number of more than LARGEST."""
    try:
        tokens = list(Environment().lex(template))  # noqa: S701, it renders nothing
    except TemplateError:
        return  # rendering says what is wrong
    for line, kind, text in tokens:
        is_large = kind in ("integer", "float") and _is_large(text.replace("_", ""))
        if is_large or (kind == "operator" and text == "**"):
            what = "a power" if text == "**" else f"the number {text[:20]}"
            raise DataError(
                f"the model's chat template has {what} in line {line}, by which it could take all "
                "time and memory; take it out of the template"
            )


def _is_large(number: str) -> bool:
    if len(number) > LONGEST:  # Python itself converts no integer of some thousand digits
        return True
    return float(ast.literal_eval(number)) > LARGEST


@contextmanager
def limited() -> Iterator[None]:
    """In this context, raise DataError where a template takes over SECONDS or BYTES."""
    thread = threading.get_ident()
    rendering = _Rendering(thread, _seconds(thread), 0)
    with _lock:
        _start_watcher()
        _now[rendering.thread] = rendering
    try:
        try:
            yield
        finally:
            if not isinstance(sys.exception(), _TooMuch):
                _end(rendering)
    except _TooMuch:
        raise DataError(
            "the model's chat template does not end: one conversation takes more than "
            f"{SECONDS:g} s or {BYTES / 2**30:g} GB; mend the template"
        ) from None


def _end(rendering: _Rendering) -> None:
    with _lock:
        _now.pop(rendering.thread, None)
    while rendering.is_ended:  # the error is on its way to this thread
        time.sleep(0.001)


def _start_watcher() -> None:
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_watch, name="templates", daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(INTERVAL)
        with _lock:
            for rendering in list(_now.values()):
                if _takes_too_much(rendering):
                    rendering.is_ended = True
                    del _now[rendering.thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(rendering.thread), ctypes.py_object(_TooMuch)
                    )


def _takes_too_much(rendering: _Rendering) -> bool:
    size = _resident()
    rendering.bytes = rendering.bytes or size
    seconds = _seconds(rendering.thread) - rendering.seconds
    # One that has hardly computed is not what the process has grown by.
    return seconds > SECONDS or (seconds > INTERVAL and size - rendering.bytes > BYTES)


def _seconds(thread: int) -> float:
    """Return the processor's seconds of a thread, or the clock's where a system tells no others."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _resident() -> int:
    if sys.platform != "linux":
        return 1
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
