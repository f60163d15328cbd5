"""How faults in data are told: all of them at once, up to what fits on a screen."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.errors import MOST_PROBLEMS, DataError, listed


def data_error(heading: str, problems: Sequence[str]) -> DataError:
    """Return the error that lists the first 50 problems and counts the rest."""
    return DataError(listed([heading, *problems], most=1 + MOST_PROBLEMS, between="\n  "), problems)
