"""How good answers are: the share that is right to the word, or BLEU where none could be."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from veneer.data.questions import Question
from veneer.errors import ConfigError

Measure = Literal["exact", "bleu"]
TITLES: dict[Measure, str] = {"exact": "Exact match (%)", "bleu": "BLEU"}
# An answer of more words can be put in too many ways to be matched exactly.
LONGEST_EXACT = 12


def measure_of(questions: Sequence[Question]) -> Measure:
    """Return what suits the questions: BLEU where a right answer is long.

    Raises ConfigError where that needs sacrebleu, which comes with the extra `compare`.
    """
    if all(len(text.split()) <= LONGEST_EXACT for q in questions for text in q.references):
        return "exact"
    if find_spec("sacrebleu") is None:
        raise ConfigError(
            "Long answers are judged by BLEU, which needs: pip install 'veneer[compare]'"
        )
    return "bleu"


def exact(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Return the per cent of answers that are one of the right ones, but for white space."""
    pairs = zip(answers, questions, strict=True)
    right = sum(_plain(text) in map(_plain, asked.references) for text, asked in pairs)
    return 100 * right / len(questions)


def bleu(answers: Sequence[str], questions: Sequence[Question]) -> tuple[float, str]:
    """Return sacrebleu's corpus BLEU over all references, and its signature.

    (Post, "A Call for Clarity in Reporting BLEU Scores", 2018.) The signature names the tokenizer.
    """
    from sacrebleu.metrics.bleu import BLEU

    most = max(len(asked.references) for asked in questions)
    # One stream for each place in the lists of references; None where a list is shorter.
    streams: Any = [
        [asked.references[n] if n < len(asked.references) else None for asked in questions]
        for n in range(most)
    ]
    metric = BLEU()
    return metric.corpus_score(list(answers), streams).score, str(metric.get_signature())


def _plain(text: str) -> str:
    return " ".join(text.split())
