"""Rewards by their names on the command line and in recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import Checks, ConfigError, VeneerError
from veneer.rewards.checkers import Exact, Matches, ValidJSON
from veneer.rewards.function import Function
from veneer.rewards.graders import read_grader
from veneer.rewards.judged import Reward, Weighted
from veneer.rewards.programs import PassesTests

KINDS = (
    "MODULE:FUNCTION or FILE.py:FUNCTION; exact, an answer that is one of its row's references; "
    "regex:PATTERN, whose group `answer` has to be a reference; json:SCHEMA.json; "
    "grader:GRADER.json, as OpenAI has them; tests, which the row's references are; or "
    "model:ADAPTER, a reward model"
)

GRADER = "grader"  # begins the name of one that is in a file


def reward_named(
    spec: str, *, seconds: float, model: Callable[[str], Reward] | None = None
) -> Reward:
    """Return the reward that a text names. seconds: that judging one answer, or one of its `tests`,
    may take. model: makes the reward of model:ADAPTER, which is not known here.

    Raises ConfigError where there is no such reward.
    """
    kind, _, rest = spec.partition(":")
    if spec == "exact":
        return Exact()
    if spec == "tests":
        return PassesTests(seconds)
    if kind == "regex" and rest:
        return Matches(rest, seconds, name=spec)
    if kind == "json" and rest:
        return ValidJSON(Path(rest), name=spec)
    if kind == GRADER and rest:
        return read_grader(Path(rest))
    if kind == "model" and rest and model is not None:
        return model(rest)
    where, _, name = spec.rpartition(":")
    if where and name.isidentifier():
        return Function(spec, seconds=seconds)
    raise ConfigError(f"{spec!r} names no reward. There are: {KINDS}.")


@contextmanager
def rewards_named(
    specs: Sequence[str],
    weights: Sequence[float],
    seconds: Sequence[float],
    *,
    model: Callable[[str], Reward] | None = None,
) -> Iterator[list[Weighted]]:
    """Yield rewards, each with its weight and time limit, and end their processes. model: as
    `reward_named` takes it.

    Raises what is wrong with all of them at once.
    """
    rewards: list[Weighted] = []
    checks = Checks("These rewards cannot be used")
    try:
        for spec, weight, limit in zip(specs, weights, seconds, strict=True):
            with checks.check():
                rewards.append(Weighted(reward_named(spec, seconds=limit, model=model), weight))
        checks.end()
        yield _with_own_names(rewards)
    finally:
        for weighted in rewards:
            with suppress(VeneerError):
                weighted.reward.close()


def _with_own_names(rewards: Sequence[Weighted]) -> list[Weighted]:
    """Return rewards of which no two have one name. Raises ConfigError."""
    names = [weighted.reward.name for weighted in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Two rewards are called {', '.join(twice)}; give each its own name.")
    return list(rewards)
