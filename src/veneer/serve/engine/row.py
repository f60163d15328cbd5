"""One request on its way through the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.adapter.invocation import invocation_start
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.kernels.transfer import sent
from veneer.serve.engine.detokenizer import Detokenizer
from veneer.serve.engine.drafts import Drafter
from veneer.serve.engine.library import Mix
from veneer.serve.engine.request import Answer, Reason, Request, Token
from veneer.serve.engine.sampler import Sampler
from veneer.serve.engine.stream import Stream


@dataclass(eq=False)
class Row:
    """A request with its slot, how many of its tokens are computed, and its answer so far."""

    stream: Stream
    mix: Mix
    sampler: Sampler
    detokenizer: Detokenizer
    most: int  # new tokens
    ends: frozenset[int]  # tokens that end an answer
    virtual: tuple[int, ...] = ()  # ids of the adapter's virtual tokens
    drafts: bool = False  # whether its tokens are guessed
    drafter: Drafter | None = None  # from its first token on
    adapter: LoadedAdapter | None = None
    slot: int = -1
    computed: int = 0  # tokens whose keys and values the slot holds
    cached: int = 0  # how many of them came from the prefix cache
    block_hashes: tuple[bytes, ...] = ()
    drawn: int = 0  # tokens that were asked for; the last of them may not have come yet
    new: int = 0  # tokens generated
    last: int = -1  # the newest of them, which the slot does not hold yet
    held: list[Token] = field(default_factory=list)  # tokens whose text is not sure yet
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    pooled: Tensor | None = None  # what it is made of, (dim,)

    def __post_init__(self) -> None:
        self.tokens = (*self.virtual, *self.request.tokens)  # which come before the answer

    @property
    def request(self) -> Request:
        return self.stream.request

    @cached_property
    def acts_from(self) -> float:
        """The token of the prompt from which on the adapter acts; infinity where it never does."""
        if self.adapter is None or not self.adapter.invocation:
            return 0
        start = invocation_start(self.request.tokens, self.adapter.invocation)
        return inf if start is None else start

    def adapter_at(self, place: int) -> LoadedAdapter | None:
        """Return what acts on the token at a place of the prompt or of the answer."""
        return self.adapter if place >= self.acts_from else None

    def until(self, place: int, end: int) -> int:
        """Return up to where, `end` at most, the same acts as on the token at `place`."""
        return min(end, int(self.acts_from)) if place < self.acts_from < inf else end

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be computed."""
        return self.computed < len(self.tokens)

    def shares_prompt(self, other: Row) -> bool:
        """Whether another row reads the same tokens by the same adapter, to answer them too."""
        mine, its = self.request, other.request
        if self is other or not (mine.answers and its.answers) or mine.tokens != its.tokens:
            return False
        if self.adapter is None or other.adapter is None:
            return self.adapter is other.adapter
        return self.adapter.content == other.adapter.content

    @property
    def is_waiting(self) -> bool:
        """Whether all that the row needs was asked for, and some of it has not come yet."""
        if self.prefilling:
            return False
        if self.sampler.matcher is not None and self.drawn > self.new:
            return True  # what a grammar allows next depends on the token that is on its way
        return not self.request.answers or self.drawn >= self.most

    def guess(self, most: int) -> Iterator[tuple[int, float]]:
        """Yield guesses at the tokens behind the newest one, each with the chance that it and all
        before it are right."""
        most = min(most, self.most - self.new - 1)  # the last token is none
        if self.drafter is not None and most > 0:
            matcher = self.sampler.matcher
            yield from self.drafter.guess(most, () if matcher is None else matcher.forced())

    def next_token(self, draft: Sequence[int] = ()) -> Chunk:
        """Return the newest token as what is computed next, and a draft of those behind it."""
        tokens, adapter = (self.last, *draft), self.adapter_at(self.computed)
        return Chunk(self.slot, tokens, self.computed, adapter, len(tokens), decoding=True)

    def next_of_prompt(self, size: int, most: int) -> Chunk:
        """Return what is computed next of the prompt: up to the next multiple of `size`, or to
        where its adapter begins to act, and of it `most` tokens at most."""
        start, prompt = self.computed, self.tokens
        adapter = self.adapter_at(start)
        end = min(start // size * size + size, start + most)
        tokens = prompt[start : self.until(start, end)]
        is_last = start + len(tokens) == len(prompt)
        logits = len(tokens) if self.request.prompt_logprobs else int(is_last)
        if self.request.embedding:
            return Chunk(self.slot, tokens, start, adapter, 0, hidden=True)
        return Chunk(self.slot, tokens, start, adapter, logits)

    def take(self, token: Token) -> Reason | None:
        """Add a token to the answer, send what is sure of it, and return why it ends, or None."""
        self.new += 1
        self.last = token.id
        if self.drafts:
            if self.drafter is None:
                self.drafter = Drafter(self.request.tokens)
            self.drafter.add(token.id)
        if token.id in self.ends:
            return "stop"
        text, sure = self.detokenizer.add(token.id)
        self.held.append(replace(token, text=text))
        if sure:
            self.stream.add(Answer(sure, tuple(self.held)))
            self.held.clear()
        if self.sampler.accept(token.id) or self.detokenizer.stopped:
            return "stop"
        return "length" if self.new >= self.most else None

    def scores(self, logits: Tensor, first: int) -> list[Tensor]:
        """Return the log probabilities (tokens,) of the tokens that follow token `first` and those
        after it, whose logits (tokens, vocab) these are; where asked for, also those of the
        likeliest in their places, and which these are, (tokens, most)."""
        following = sent(self.tokens[first + 1 : first + 1 + len(logits)], logits.device)
        logs = logits[: len(following), : self.sampler.size].log_softmax(-1)
        # Those of virtual tokens, which are none of the vocabulary's, are not shown.
        following = following.long().clamp(max=logs.shape[1] - 1)
        own = logs.gather(1, following[:, None])[:, 0]
        if self.request.logprobs is None:
            return [own]
        top = logs.topk(min(self.request.logprobs, logs.shape[1]))
        return [own, top.values, top.indices]

    def take_scores(self, own: Tensor, *top: Tensor) -> None:
        """Add the log probabilities of the tokens that follow, and of the likeliest, with these."""
        self.prompt_logprobs += own.tolist()
        for values, tokens in zip(*(each.tolist() for each in top), strict=True):
            self.prompt_top.append(tuple(zip(tokens, values, strict=True)))

    @property
    def scored(self) -> dict[str, Any]:
        """What an answer has of each token of the request after those before it."""
        if not self.request.prompt_logprobs:
            return {}
        # Nothing of the text comes before its first token.
        virtual = len(self.prompt_logprobs) - (len(self.request.tokens) - 1)
        scored: dict[str, Any] = {"prompt_logprobs": (None, *self.prompt_logprobs[virtual:])}
        if self.request.logprobs is not None:
            scored["prompt_top"] = ((), *self.prompt_top[virtual:])
        return scored

    def take_hidden(self, hidden: Tensor, first: int) -> None:
        """Add what the decoder gives for tokens from `first` on, (tokens, dim), to the embedding,
        which is whole with the last of them."""
        own = hidden[max(0, len(self.virtual) - first) :]
        # One by one, so that the sum does not depend on how the text was cut.
        for token in own if self.request.embedding == "mean" else own[-1:]:
            is_first = self.pooled is None or self.request.embedding == "last"
            self.pooled = token if is_first else self.pooled + token
        if not self.prefilling:
            assert self.pooled is not None
            # A mean has its sum's direction.
            self.embedding = tuple(F.normalize(self.pooled, dim=0).tolist())

    def finish(self, reason: Reason, error: Exception | None = None) -> None:
        """Send the last piece: what is left of the text, and why the answer ended."""
        is_whole = reason in ("stop", "length")
        text, tokens = (self.detokenizer.end(), tuple(self.held)) if is_whole else ("", ())
        self.stream.add(
            Answer(
                text,
                tokens,
                reason,
                prompt_tokens=len(self.request.tokens),
                cached_tokens=max(0, self.cached - len(self.virtual)),
                new_tokens=self.new,
                error=error,
                embedding=self.embedding,
                **(self.scored if is_whole else {}),
            )
        )
