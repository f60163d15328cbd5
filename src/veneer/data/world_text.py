"""The small world as text: rows of paragraphs, and of questions with their answers."""

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from veneer.data.problems import Located, Place
from veneer.data.rows import Conversation, Message, PlainText, Row
from veneer.data.world import Fact, facts

_EXCHANGES = 0.4  # share of rows that are question and answer; the rest are paragraphs
_SENTENCES = (2, 4)  # shortest and longest paragraph

_Card = TypeVar("_Card")


def world_rows(seed: int, documents: int) -> list[Located[Row]]:
    """Return `world_text` with a place for each row: world:1, world:2, ..."""
    rows = enumerate(world_text(seed, documents), start=1)
    return [Located(row, Place("world", number)) for number, row in rows]


def world_text(seed: int, documents: int) -> list[Row]:
    """Return `documents` rows: paragraphs about one topic, and exchanges about one fact.

    Paragraphs and exchanges are each dealt like a deck of cards, so that whatever the seed, no
    fact comes again before every other has come. The same seed gives the same rows.
    """
    rng = random.Random(seed)
    paragraphs = _deal(lambda: _paragraphs(rng), rng)
    exchanges = _deal(lambda: _exchanges(rng), rng)
    return [
        next(exchanges) if rng.random() < _EXCHANGES else next(paragraphs) for _ in range(documents)
    ]


def _deal(new_deck: Callable[[], list[_Card]], rng: random.Random) -> Iterator[_Card]:
    """Yield a shuffled deck, then the next one, without end."""
    while True:
        cards = new_deck()
        rng.shuffle(cards)
        yield from cards


def _paragraphs(rng: random.Random) -> list[PlainText]:
    """Return the whole world once, as paragraphs."""
    topics: dict[str, list[Fact]] = {}
    for fact in facts():
        topics.setdefault(fact.topic, []).append(fact)
    paragraphs = []
    for of_topic in topics.values():
        rng.shuffle(of_topic)
        sentences = [rng.choice(fact.statements) for fact in of_topic]
        while sentences:
            length = rng.randint(*_SENTENCES)
            paragraphs.append(PlainText(" ".join(sentences[:length])))
            sentences = sentences[length:]
    return paragraphs


def _exchanges(rng: random.Random) -> list[Conversation]:
    """Return the whole world once, as questions and answers."""
    return [
        Conversation(
            (Message("user", rng.choice(fact.questions)), Message("assistant", fact.answer))
        )
        for fact in facts()
    ]
