"""How faults in data are told: all of them at once, up to what fits on a screen."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.errors import DataError

SHOWN = 50


def data_error(heading: str, problems: Sequence[str]) -> DataError:
    """Return the error that lists the first 50 problems and counts the rest."""
    lines = [heading, *(f"  {problem}" for problem in problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return DataError("\n".join(lines), problems)
