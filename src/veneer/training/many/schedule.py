"""Which runs have a batch in the next pass over their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the next pass may take of a run: the tokens of its next batch; and how far the run is,
    as the share of its steps that it has made."""

    tokens: int
    done: float


def check_limit(tokens_per_pass: int) -> None:
    """Raise ConfigError where passes would have no tokens."""
    if tokens_per_pass < 1:
        raise ConfigError(f"tokens_per_pass is {tokens_per_pass}, but must be at least 1.")


def choose(waiting: Sequence[Waiting], limit: int) -> list[int]:
    """Return which runs share the next pass, of at most `limit` tokens unless one batch alone has
    more: those that are least far first, so that all end together, and no pass is a short one
    because most have ended before.

    Where one of them does not fit, the next that does takes its place.
    """
    chosen: list[int] = []
    left = limit
    for number in sorted(range(len(waiting)), key=lambda number: waiting[number].done):
        tokens = waiting[number].tokens
        if tokens <= left or not chosen:
            chosen.append(number)
            left -= tokens
    return sorted(chosen)
