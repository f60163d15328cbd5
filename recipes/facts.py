"""Facts of a domain: those of the demo, asked in wordings that training never shows."""

import sys
from pathlib import Path

from recipes.family import Family, Row

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import cuisine


def is_right(answer: str, row: Row) -> bool:
    return cuisine.is_right(answer, row.completion)


FAMILY = Family(
    "facts",
    "facts about a place that no model has read of",
    tuple(Row(**row) for row in cuisine.training_rows()),
    tuple(Row(question, key) for question, key in cuisine.held_out()),
    is_right,
    32,
)
