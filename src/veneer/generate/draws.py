"""The next tokens of many rows at once, drawn without asking the device for anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.generate.sampling import Sampling
from veneer.kernels.transfer import sent


@dataclass(frozen=True)
class Draw:
    """How a row is drawn. generator: the row's own, or torch's for all that have none. min_p: a
    token is at least so many times as likely as the likeliest. size: the tokens that may be drawn
    are the first ones, so many; None for all."""

    sampling: Sampling
    generator: torch.Generator | None = None
    min_p: float = 0.0
    size: int | None = None


def next_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return the next token of each row, (rows,), on the device of `logits` (rows, vocab)."""
    tokens = logits.argmax(-1)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if not rows:
        return tokens
    index = sent(rows, logits.device)
    drawn = _drawn(logits.index_select(0, index), [draws[row] for row in rows])
    return tokens.index_copy(0, index, drawn)


def _drawn(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw from tokens that `min_p` leaves, of these from at most the top_k likeliest, and of these
    from those that reach top_p.

    A token is drawn with probability p by taking the largest p / e, where the e are exponentially
    distributed.
    """
    vocab, settings = scores.shape[1], [draw.sampling for draw in draws]
    # A top_p of 1 hides nothing, however the sum of all chances was rounded.
    bounds = [
        (s.temperature, s.top_k or vocab, s.top_p if s.top_p < 1 else 2.0, draw.min_p)
        for s, draw in zip(settings, draws, strict=True)
    ]
    # Each (rows, 1).
    temperature, top_k, top_p, min_p = sent(bounds, scores.device).unsqueeze(-1).unbind(1)
    chances, tokens = (scores / temperature).softmax(-1), None
    if any(draw.min_p for draw in draws):
        chances = chances.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), 0.0)
        chances = chances / chances.sum(-1, keepdim=True)
    if any(s.top_k or s.top_p < 1 for s in settings):
        chances, tokens = chances.sort(-1, descending=True)
        beyond = torch.arange(vocab, device=scores.device) >= top_k
        chances = chances.masked_fill(beyond, 0.0)
        before = chances.cumsum(-1) - chances
        # top_p is a share of what top_k leaves, as in transformers.
        chances = chances.masked_fill(before >= top_p * chances.sum(-1, keepdim=True), 0.0)
    waits = torch.ones_like(chances)
    for row, draw in zip(waits, draws, strict=True):
        row[: draw.size].exponential_(generator=draw.generator)
    drawn = (chances / waits).argmax(-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)
