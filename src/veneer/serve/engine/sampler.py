"""The next token of each row, drawn as the row's own settings say.

On a CPU each row is drawn by itself. On another device all rows are drawn at once and nothing is
asked of the device: their tokens stay there for the next step, and are on their way to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.generate.sampling import Sampling
from veneer.kernels.transfer import OnTheWay, sent
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


class Drawn:
    """The next token of each row: `ids` (rows,) on the device of the logits, and all of them as
    values where somebody waits for them."""

    def __init__(self, logits: Tensor, samplers: Sequence[Sampler]) -> None:
        self._samplers = samplers
        self._tokens: list[Token] | None = None
        if logits.device.type == "cpu":
            self._tokens = sample(logits, samplers)
            self.ids = torch.tensor([token.id for token in self._tokens])
            return
        self.ids = drawn_at_once(logits, samplers)
        self._coming = OnTheWay(self.ids, *_logprobs(logits, self.ids, samplers))

    def tokens(self) -> list[Token]:
        """Return the tokens, without their text; this waits for the device."""
        if self._tokens is None:
            ids, *logprobs = (tensor.tolist() for tensor in self._coming.arrived())
            self._tokens = [Token(token) for token in ids]
            asked = [row for row, of in enumerate(self._samplers) if of.logprobs is not None]
            for row, own, values, indices in zip(asked, *logprobs, strict=True):
                most = self._samplers[row].logprobs
                top = tuple(zip(indices[:most], values[:most], strict=True))
                self._tokens[row] = Token(ids[row], "", own[0], top)
        return self._tokens


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


def drawn_at_once(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return the next token of each row, (rows,), on the device of `logits` (rows, vocab)."""
    tokens = logits.argmax(-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if not rows:
        return tokens
    drawing, index = [samplers[row] for row in rows], sent(rows, logits.device)
    return tokens.index_copy(0, index, _drawn_rows(logits.index_select(0, index), drawing))


def _drawn_rows(scores: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw as `_drawn` does, for all rows (rows, vocab). A token is drawn with probability p by
    taking the largest p / e, where the e are exponentially distributed."""
    vocab, settings = scores.shape[1], [sampler.sampling for sampler in samplers]
    # A top_p of 1 hides nothing, however the sum of all chances was rounded.
    bounds = [(s.temperature, s.top_k or vocab, s.top_p if s.top_p < 1 else 2.0) for s in settings]
    temperature, top_k, top_p = sent(bounds, scores.device).unsqueeze(-1).unbind(1)  # (rows, 1)
    chances, tokens = (scores / temperature).softmax(-1), None
    if any(s.top_k or s.top_p < 1 for s in settings):
        chances, tokens = chances.sort(-1, descending=True)
        beyond = torch.arange(vocab, device=scores.device) >= top_k
        chances = chances.masked_fill(beyond, 0.0)
        before = chances.cumsum(-1) - chances
        # top_p is a share of what top_k leaves, as in transformers.
        chances = chances.masked_fill(before >= top_p * chances.sum(-1, keepdim=True), 0.0)
    waits = torch.empty_like(chances)
    for row, sampler in zip(waits, samplers, strict=True):
        row.exponential_(generator=sampler.generator)
    drawn = (chances / waits).argmax(-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def _logprobs(logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]) -> list[Tensor]:
    """Return, for the rows that ask for them, the log probability of the token drawn (rows, 1), and
    those of the likeliest tokens, with these, (rows, most); nothing where no row asks."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs is not None]
    if not rows:
        return []
    index = sent(rows, logits.device)
    # Those of the model itself, before temperature, top_k and top_p.
    logs = logits.index_select(0, index).log_softmax(-1)
    top = logs.topk(max(samplers[row].logprobs or 0 for row in rows))
    own = logs.gather(1, tokens.index_select(0, index)[:, None])
    return [own, top.values, top.indices]
