"""The names of devices, as flags, recipes and functions take them. Imports no torch."""

from __future__ import annotations

import re

from veneer.checks import Rule
from veneer.errors import ConfigError

# As torch names them; cuda means AMD's cards too, where torch is built for ROCm.
ACCELERATORS = ("cuda", "mps", "xpu")


def parse_device(name: str) -> tuple[str, int | None]:
    """Return the type of device that a name means, or auto, and the number after it, if any.

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(rf"(auto|cpu|{'|'.join(ACCELERATORS)})(?::(\d{{1,4}}))?", name)
    if match is None or (match[2] and match[1] not in ACCELERATORS):
        raise ConfigError(f"device is {name!r}, but must be {DEVICE.text}.")
    return match[1], None if match[2] is None else int(match[2])


def _is_name(value: object) -> bool:
    try:
        parse_device(str(value))
    except ConfigError:
        return False
    return True


DEVICE = Rule(
    _is_name,
    f"auto, cpu, {', '.join(ACCELERATORS[:-1])} or {ACCELERATORS[-1]}, or one of several such as "
    f"{ACCELERATORS[0]}:1",
)
