"""The next token of each row, drawn as the row's own settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.generate.sampling import Sampling
from veneer.serve.engine.request import Request, Token

# Enough tokens for most values of top_p; sorting the whole vocabulary takes longer than a step of a
# small model.
FIRST = 256


@dataclass(frozen=True)
class Sampler:
    """How a row's tokens are drawn. generator: the row's own, so that other rows change nothing."""

    sampling: Sampling
    generator: torch.Generator | None = None
    logprobs: int | None = None

    @classmethod
    def of(cls, request: Request, device: torch.device) -> Sampler:
        """Return the sampler that a request asks for."""
        sampling, generator = request.sampling, None
        if sampling.temperature > 0:
            generator = torch.Generator(device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        return cls(sampling, generator, request.logprobs)


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token]:
    """Return the next token of each row, without its text. logits (rows, vocab), float32."""
    likeliest = logits.argmax(-1).tolist()
    tokens = []
    for scores, sampler, best in zip(logits, samplers, likeliest, strict=True):
        token = best if sampler.sampling.temperature == 0 else _drawn(scores, sampler)
        if sampler.logprobs is None:
            tokens.append(Token(token))
            continue
        # Those of the model itself, before temperature, top_k and top_p.
        logs = scores.log_softmax(-1)
        top = logs.topk(sampler.logprobs)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        tokens.append(Token(token, "", float(logs[token]), tuple(pairs)))
    return tokens


def _drawn(scores: Tensor, sampler: Sampler) -> int:
    """Draw from at most the top_k likeliest tokens, and of these from those that reach top_p."""
    sampling = sampler.sampling
    chances = (scores / sampling.temperature).softmax(-1)  # (vocab,)
    tokens = None
    if sampling.top_k or sampling.top_p < 1:
        bound = min(sampling.top_k or len(chances), len(chances))
        top = chances.topk(min(bound, FIRST))
        if bound > FIRST and float(top.values.sum()) < sampling.top_p:
            top = chances.topk(bound)
        chances, tokens = top.values, top.indices
        if sampling.top_p < 1:
            # top_p is a share of what top_k leaves, as in transformers.
            whole = chances.sum() if sampling.top_k else 1.0
            before = chances.cumsum(0) - chances
            chances = chances.masked_fill(before >= sampling.top_p * whole, 0.0)
    drawn = int(torch.multinomial(chances, 1, generator=sampler.generator))
    return drawn if tokens is None else int(tokens[drawn])
