"""A report as plain values, without what tells who has made it, and where."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

# Users and hosts of this name say nothing, and the words may mean something else.
NOBODY = ("", "root", "user", "ubuntu", "runner", "nobody", "localhost", "admin", "vm")


def plain(value: Any) -> Any:
    """Return a value as JSON has it, with private words left out of its texts."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Path | str):
        return without_private(str(value))
    if isinstance(value, Sequence):
        return [plain(entry) for entry in value]
    return value


def without_private(text: str) -> str:
    """Return a text with ~ for home, USER for the user's name and HOST for that of the machine."""
    with suppress(RuntimeError):  # nobody has a home
        home = str(Path.home())
        if home != "/":
            text = re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)
    for name, word in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if name.lower() not in NOBODY:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a process of no known user
        return ""
