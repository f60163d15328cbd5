"""A few prompts for runs on samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.random_adapters import tokenizer
from veneer.data.problems import Located, Place
from veneer.data.questions import Question
from veneer.data.rows import Message
from veneer.training.on_policy.prompts import Prompts, encoded


def prompts(
    texts: Sequence[str] = ("Name a fruit", "Say it again", "And now?"), **options: Any
) -> Prompts:
    rows = [
        Located(Question((Message("user", text),), ("apple",)), Place("prompts.jsonl", i + 1))
        for i, text in enumerate(texts)
    ]
    return encoded(rows, tokenizer(), **{"context": 60, "max_new_tokens": 6} | options)
