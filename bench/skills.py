"""Skills that can be verified and that SmolLM2-135M has weakly: what `bench.rewards` teaches."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.data.problems import Located, Place
from veneer.data.questions import Question
from veneer.data.rows import Message
from veneer.rewards.checkers import Matches, ValidJSON
from veneer.rewards.judged import Weighted

RIGHT, SHAPE = r"^The sum is (?<answer>\d+)\.$", r"^The sum is \d+\.$"
SHOWN = ((2, 3, 4), (5, 1, 2))  # examples of the form, before each question

THREE = {
    "type": "array",
    "items": {"type": "string", "minLength": 2},
    "minItems": 3,
    "maxItems": 3,
    "uniqueItems": True,
}
WORDINGS = ("Name three {} as a JSON array.", "Give me three {} as a JSON array.")
# The last third is never trained on.
KINDS = (
    *("fruits", "vegetables", "animals", "birds", "fish", "insects", "trees", "flowers", "tools"),
    *("metals", "gems", "planets", "oceans", "cities", "islands", "mountains", "deserts", "games"),
    *(
        "dances",
        "songs",
        "painters",
        "writers",
        "poets",
        "scientists",
        "soups",
        "cheeses",
        "spices",
    ),
    *("cakes", "drinks", "breads", "shoes", "hats", "fabrics", "shapes", "numbers", "seasons"),
    *("rivers", "colours", "sports", "instruments", "languages", "jobs", "emotions", "vehicles"),
    *("rooms", "toys", "holidays", "countries", "lakes", "dogs", "herbs", "desserts", "machines"),
)


@dataclass(frozen=True)
class Skill:
    """Questions to learn from, others that are kept from learning, and how answers are judged."""

    training: Sequence[Located[Question]]
    held_out: Sequence[Located[Question]]
    rewards: Sequence[Weighted]


def sums(held_out: int, *, largest: int, shape_weight: float) -> Skill:
    """The sum of three numbers from 1 to `largest`, behind two examples of the form."""
    right = Weighted(Matches(RIGHT, name="right"), 1 - shape_weight)
    shape = [Weighted(Matches(SHAPE, name="shape"), shape_weight)] * bool(shape_weight)

    def draw(count: int, seed: int) -> list[Located[Question]]:
        numbers = random.Random(seed)
        return _numbered(
            _sum([numbers.randint(1, largest) for _ in range(3)]) for _ in range(count)
        )

    return Skill(draw(500, 1), draw(held_out, 2), [right, *shape])


def _sum(numbers: Sequence[int]) -> Question:
    shown = [(_asked(some), f"The sum is {sum(some)}.") for some in SHOWN]
    return _question(shown, _asked(numbers), (str(sum(numbers)),))


def _asked(numbers: Sequence[int]) -> str:
    return f"What is {' + '.join(map(str, numbers))}?"


def lists(held_out: int) -> Skill:
    """Three things of a kind as a JSON array, behind one example."""
    known = len(KINDS) * 2 // 3
    with tempfile.TemporaryDirectory() as there:
        schema = Path(there) / "three.json"
        schema.write_text(json.dumps(THREE))
        valid = Weighted(ValidJSON(schema), 1.0)
    training = _numbered(_list(word, kind) for kind in KINDS[:known] for word in WORDINGS)
    random.Random(1).shuffle(training)
    kept = _numbered(_list(WORDINGS[0], kind) for kind in KINDS[known:][:held_out])
    return Skill(training, kept, [valid])


def _list(wording: str, kind: str) -> Question:
    example = (wording.format("days"), '["Monday", "Tuesday", "Friday"]')
    return _question([example], wording.format(kind), ())


def _question(
    shown: Sequence[tuple[str, str]], asked: str, references: tuple[str, ...]
) -> Question:
    turns = []
    for question, answer in shown:
        turns += [Message("user", question), Message("assistant", answer)]
    return Question((*turns, Message("user", asked)), references)


def _numbered(questions: Iterable[Question]) -> list[Located[Question]]:
    return [Located(each, Place("skill", i + 1)) for i, each in enumerate(questions)]
