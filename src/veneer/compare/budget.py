"""How far each method may go: a number of steps, of tokens or of minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from veneer.errors import ConfigError

Unit = Literal["steps", "tokens", "minutes"]


@dataclass(frozen=True)
class Budget:
    """What every method gets of `unit`."""

    unit: Unit
    amount: float

    def steps(self, *, tokens_a_step: float, seconds_a_step: float = math.nan) -> int:
        """Return how many steps the budget is, at least one.

        tokens_a_step: their mean, the same for every method, as the order of rows is. Minutes are
        of training alone, and need the seconds of a step.
        """
        match self.unit:
            case "steps":
                steps = self.amount
            case "tokens":
                steps = round(self.amount / tokens_a_step)
            case "minutes":
                steps = 60 * self.amount / seconds_a_step
        return max(1, int(steps))

    def __str__(self) -> str:
        if self.amount == 1:
            return f"1 {self.unit.removesuffix('s')}"
        return f"{self.amount:,.12g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """Return the budget that steps:200, tokens:100000 or minutes:5 says.

    Raises ConfigError, which says what is wrong with it.
    """
    unit, _, number = text.partition(":")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    whole = unit == "minutes" or amount.is_integer()
    if unit not in get_args(Unit) or not 0 < amount < math.inf or not whole:
        raise ConfigError(
            f"budget is {text!r}, but must be steps:N, tokens:N or minutes:N, with N above 0"
        )
    return Budget(cast(Unit, unit), amount)
