"""The next token of each row, drawn as the row's own settings say.

On a CPU each row is drawn by itself. On another device all rows are drawn at once and nothing is
asked of the device: their tokens stay there for the next step, and are on their way to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.adapter.own_rows import padded
from veneer.generate.draws import Draw, next_tokens
from veneer.generate.sampling import Sampling
from veneer.kernels.transfer import OnTheWay, sent
from veneer.serve.engine.grammar import Matcher
from veneer.serve.engine.request import Adjustments, Request, Token

# Enough tokens for most values of top_p; sorting the whole vocabulary takes longer than a step of a
# small model.
FIRST = 256


@dataclass(eq=False)
class Sampler:
    """How a row's tokens are drawn. generator: the row's own, so that other rows change nothing.

    prompt: its tokens. ends: tokens that end an answer. matcher: where the answer is in its
    grammar, None without one. size: how many logits a token of the row has; those of a matrix may
    be more, and are then -∞. None for all of them.
    """

    sampling: Sampling
    generator: torch.Generator | None = None
    logprobs: int | None = None
    adjustments: Adjustments = field(default_factory=Adjustments)
    prompt: Sequence[int] = ()
    ends: Sequence[int] = ()
    matcher: Matcher | None = None
    size: int | None = None
    _history: History | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        device: torch.device,
        *,
        ends: Iterable[int] = (),
        matcher: Matcher | None = None,
        size: int | None = None,
    ) -> Sampler:
        """Return the sampler that a request asks for."""
        sampling, generator = request.sampling, None
        if sampling.temperature > 0:
            generator = torch.Generator(device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        return cls(
            sampling,
            generator,
            request.logprobs,
            request.adjustments,
            request.tokens,
            tuple(ends),
            matcher,
            size,
        )

    @property
    def adjusts(self) -> bool:
        """Whether the row draws from other logits than the model's."""
        return self.matcher is not None or self.adjustments.of_logits

    def adjusted(self, scores: Tensor) -> Tensor:
        """Return logits (vocab,) as the row draws from them: `scores` itself where nothing is asked
        for. Raises RequestError where the grammar allows no token."""
        if not self.adjusts:
            return scores
        # The order is vLLM's.
        adjustments, changed = self.adjustments, scores.clone()
        if self.matcher is not None:
            allowed = sent(self.matcher.allowed(self.ends), scores.device)
            changed.masked_fill_(~allowed, -torch.inf)
        if adjustments.logit_bias:
            tokens, biases = zip(*adjustments.logit_bias, strict=True)
            own = sent(biases, scores.device).to(scores.dtype)
            changed.index_add_(0, sent(tokens, scores.device), own)
        if adjustments.penalizes:
            if self._history is None:
                self._history = History(scores, self.prompt)
            self._history.penalize(changed, adjustments)
        return changed

    def note(self, token: Tensor) -> None:
        """Note the token that was drawn, (1,) on the device of the logits."""
        if self._history is not None:
            self._history.add(token)

    def accept(self, token: int) -> bool:
        """Go on by a token that was drawn, and return whether the grammar ends the answer there.

        Raises RequestError where the grammar grows beyond its limits.
        """
        if self.matcher is None:
            return False
        self.matcher.accept(token)
        return self.matcher.ended


class History:
    """Which tokens a row has so far. new: how often its answer has each, (vocab,)."""

    def __init__(self, scores: Tensor, prompt: Sequence[int]) -> None:
        self.new = torch.zeros_like(scores)
        self.in_prompt = torch.zeros_like(scores, dtype=torch.bool)
        self.in_prompt.index_fill_(0, sent(list(prompt), scores.device), True)
        self._one = torch.ones_like(scores[:1])

    def add(self, token: Tensor) -> None:
        self.new.index_add_(0, token, self._one)

    def penalize(self, scores: Tensor, adjustments: Adjustments) -> None:
        """Take penalties from logits (vocab,), in place."""
        is_new = self.new > 0
        if adjustments.repetition_penalty != 1.0:
            factor = torch.full_like(scores, adjustments.repetition_penalty)
            factors = torch.where(scores > 0, 1.0 / factor, factor)
            scores.mul_(torch.where(self.in_prompt | is_new, factors, 1.0))
        scores.sub_(self.new, alpha=adjustments.frequency_penalty)
        scores.sub_(is_new.to(scores.dtype), alpha=adjustments.presence_penalty)


class Drawn:
    """The next token of each row: `ids` (rows,) on the device of the logits, and all of them as
    values where somebody waits for them."""

    def __init__(self, logits: Tensor, samplers: Sequence[Sampler]) -> None:
        self._samplers = samplers
        self._tokens: list[Token | Exception] | None = None
        self._failed: dict[int, Exception] = {}
        if logits.device.type == "cpu":
            self._tokens = sample(logits, samplers)
            ids = [token.id if isinstance(token, Token) else 0 for token in self._tokens]
            self.ids = torch.tensor(ids)
            return
        self.ids = drawn_at_once(self._adjusted(logits), samplers)
        for own, sampler in zip(self.ids.split(1), samplers, strict=True):
            sampler.note(own)
        self._coming = OnTheWay(self.ids, *_logprobs(logits, self.ids, samplers))

    def tokens(self) -> list[Token | Exception]:
        """Return the tokens, without their text, or what keeps a row from having one; this waits
        for the device."""
        if self._tokens is None:
            ids, *logprobs = (tensor.tolist() for tensor in self._coming.arrived())
            tokens: list[Token | Exception] = [Token(token) for token in ids]
            asked = [row for row, of in enumerate(self._samplers) if of.logprobs is not None]
            for row, own, values, indices in zip(asked, *logprobs, strict=True):
                most = self._samplers[row].logprobs
                top = tuple(zip(indices[:most], values[:most], strict=True))
                tokens[row] = Token(ids[row], "", own[0], top)
            for row, error in self._failed.items():
                tokens[row] = error
            self._tokens = tokens
        return self._tokens

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return the logits (rows, vocab) from which rows draw; `logits` where none changes any."""
        if not any(sampler.adjusts for sampler in self._samplers):
            return logits
        rows = list(logits)
        for row, sampler in enumerate(self._samplers):
            try:
                own = sampler.adjusted(rows[row][: sampler.size])
                rows[row] = padded(own, logits.shape[1])
            except Exception as error:  # of this row, and no other
                self._failed[row] = error
        return torch.stack(rows)


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token | Exception]:
    """Return the next token of each row, without its text, or what keeps this row from having one.

    logits (rows, vocab), float32.
    """
    likeliest = logits.argmax(-1).tolist()
    tokens: list[Token | Exception] = []
    for scores, sampler, best in zip(logits, samplers, likeliest, strict=True):
        try:
            tokens.append(_next_token(scores[: sampler.size], sampler, best))
        except Exception as error:  # of this row, and no other
            tokens.append(error)
    return tokens


def _next_token(scores: Tensor, sampler: Sampler, best: int) -> Token:
    """Return a row's next token. best: the likeliest of its logits (vocab,) as they are."""
    adjusted = sampler.adjusted(scores)
    if sampler.sampling.temperature > 0:
        token = _drawn(adjusted, sampler)
    else:
        token = best if adjusted is scores else int(adjusted.argmax())
    sampler.note(torch.tensor([token]))
    if sampler.logprobs is None:
        return Token(token)
    # Those of the model itself, before anything that the request asks for.
    logs = scores.log_softmax(-1)
    top = logs.topk(sampler.logprobs)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Token(token, "", float(logs[token]), tuple(pairs))


def _drawn(scores: Tensor, sampler: Sampler) -> int:
    chances, tokens = chances_of(scores, sampler)
    drawn = int(torch.multinomial(chances, 1, generator=sampler.generator))
    return drawn if tokens is None else int(tokens[drawn])


def chances_of(scores: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
    """Return the weights of a draw from logits (vocab,), and of which tokens; None for all of them.

    Tokens are at least min_p times as likely as the likeliest, at most the top_k likeliest of
    these, and of those the ones that reach top_p.
    """
    sampling, min_p = sampler.sampling, sampler.adjustments.min_p
    chances = (scores / sampling.temperature).softmax(-1)  # (vocab,)
    if min_p:
        chances = chances.masked_fill(chances < min_p * chances.max(), 0.0)
        chances = chances / chances.sum()
    if not sampling.top_k and sampling.top_p == 1:
        return chances, None
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
    return chances, tokens


def drawn_at_once(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return the next token of each row, (rows,), on the device of `logits` (rows, vocab)."""
    return next_tokens(
        logits,
        [
            Draw(each.sampling, each.generator, each.adjustments.min_p, each.size)
            for each in samplers
        ],
    )


def _logprobs(logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]) -> list[Tensor]:
    """Return, for the rows that ask for them, the log probability of the token drawn (rows, 1), and
    those of the likeliest tokens, with these, (rows, most); nothing where no row asks."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs is not None]
    if not rows:
        return []
    index = sent(rows, logits.device)
    # Those of the model itself, before anything that a request asks for.
    logs = logits.index_select(0, index).log_softmax(-1)
    top = logs.topk(max(samplers[row].logprobs or 0 for row in rows))
    own = logs.gather(1, tokens.index_select(0, index)[:, None])
    return [own, top.values, top.indices]
