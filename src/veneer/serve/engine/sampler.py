"""The next token of each row, drawn as the row's own settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.generate.sampling import Sampling

# Far enough for most of what top_p asks for; sorting the whole vocabulary takes longer than a
# small model's step.
FIRST = 256


@dataclass(frozen=True)
class Choice:
    """A token, and where asked for its log probability and the likeliest with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chooser:
    """How a row chooses. generator: the row's own draws, whatever happens in others."""

    sampling: Sampling
    generator: torch.Generator | None
    logprobs: int | None


def choose(logits: Tensor, rows: Sequence[Chooser]) -> list[Choice]:
    """Return the next token of each row. logits (rows, words), float32."""
    likeliest = logits.argmax(-1).tolist()
    choices = []
    for scores, row, best in zip(logits, rows, likeliest, strict=True):
        token = best if row.sampling.temperature == 0 else _drawn(scores, row)
        if row.logprobs is None:
            choices.append(Choice(token))
            continue
        # Those of the model itself, before temperature and bounds.
        logs = scores.log_softmax(-1)
        top = logs.topk(row.logprobs) if row.logprobs else None
        pairs = () if top is None else zip(top.indices.tolist(), top.values.tolist(), strict=True)
        choices.append(Choice(token, float(logs[token]), tuple(pairs)))
    return choices


def _drawn(scores: Tensor, row: Chooser) -> int:
    """Draw from the likeliest words: at most top_k, then those that together reach top_p."""
    sampling = row.sampling
    chances = (scores / sampling.temperature).softmax(-1)  # (words,)
    words = None
    if sampling.top_k or sampling.top_p < 1:
        bound = min(sampling.top_k or len(chances), len(chances))
        top = chances.topk(min(bound, FIRST))
        if bound > FIRST and float(top.values.sum()) < sampling.top_p:
            top = chances.topk(bound)
        chances, words = top.values, top.indices
        if sampling.top_p < 1:
            # top_p is a part of what top_k leaves, as in transformers.
            whole = chances.sum() if sampling.top_k else 1.0
            before = chances.cumsum(0) - chances
            chances = chances.masked_fill(before >= sampling.top_p * whole, 0.0)
    drawn = int(torch.multinomial(chances, 1, generator=row.generator))
    return drawn if words is None else int(words[drawn])
