"""One request on its way through the engine."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.serve.engine.adapter_cache import Loaded, Mix
from veneer.serve.engine.detokenizer import Text
from veneer.serve.engine.prefix import Beginning
from veneer.serve.engine.request import Finished, Piece, Reason, Request, Token
from veneer.serve.engine.runner import Chunk
from veneer.serve.engine.sampler import Choice, Chooser
from veneer.serve.engine.stream import Stream


@dataclass(eq=False)
class Row:
    """A request with its slot, how far it has been read, and what was answered so far."""

    tokens: tuple[int, ...]
    mix: Mix
    loaded: Loaded | None = None
    slot: int = -1
    done: int = 0  # tokens that the slot holds
    cached: int = 0  # of these, how many came from the prefix cache
    beginning: Beginning = field(default_factory=lambda: Beginning(()))

    @property
    def reading(self) -> bool:
        return self.done < len(self.tokens)

    @property
    def over(self) -> bool:
        """Whether nobody waits for the row any more."""
        raise NotImplementedError

    def next_chunk(self, size: int) -> Chunk:
        """Return what of the prompt is read next: up to the next multiple of `size`, so that what
        is read together never depends on what was in the cache."""
        last = min(self.done // size * size + size, len(self.tokens))
        wanted: Literal["last", "none"] = "last" if last == len(self.tokens) else "none"
        return Chunk(
            self.slot, self.tokens[self.done : last], self.done, self.loaded, wanted, False
        )

    def fail(self, error: Exception) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Answering(Row):
    """A row that is answered."""

    stream: Stream = field(kw_only=True)
    text: Text = field(kw_only=True)
    chooser: Chooser = field(kw_only=True)
    most: int = field(kw_only=True)  # new tokens
    ends: frozenset[int] = field(kw_only=True)
    last: int = -1  # the newest token, which the slot does not hold yet
    new: int = 0
    untold: list[Token] = field(default_factory=list)  # tokens whose text is held back

    @classmethod
    def of(
        cls,
        stream: Stream,
        mix: Mix,
        tokenizer: PreTrainedTokenizerBase,
        *,
        most: int,
        ends: frozenset[int],
        device: torch.device,
    ) -> Answering:
        request = stream.request
        generator = None
        if request.sampling.temperature > 0:
            generator = torch.Generator(device)
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
        return cls(
            request.tokens,
            mix,
            stream=stream,
            text=Text(tokenizer, request.stop),
            chooser=Chooser(request.sampling, generator, request.logprobs),
            most=most,
            ends=ends,
        )

    @property
    def request(self) -> Request:
        return self.stream.request

    @property
    def over(self) -> bool:
        return self.stream.cancelled

    def next_token(self) -> Chunk:
        return Chunk(self.slot, (self.last,), self.done, self.loaded, "last", True)

    def take(self, choice: Choice) -> Reason | None:
        """Add a token to the answer, tell what is sure of it, and return why it ends, or None."""
        self.new += 1
        self.last = choice.id
        if choice.id in self.ends:
            return "stop"
        own, sure = self.text.add(choice.id)
        self.untold.append(Token(choice.id, own, choice.logprob, choice.top))
        if sure:
            self._tell(sure)
        if self.text.stopped:
            return "stop"
        return "length" if self.new >= self.most else None

    def finish(self, reason: Reason, error: str = "") -> None:
        """Tell what is left, and that it was all."""
        if reason in ("stop", "length") and ((rest := self.text.end()) or self.untold):
            self._tell(rest)
        self.stream.put(Finished(reason, len(self.tokens), self.new, self.cached, error))

    def fail(self, error: Exception) -> None:
        self.finish("error", str(error) or type(error).__name__)

    def _tell(self, text: str) -> None:
        self.stream.put(Piece(text, tuple(self.untold)))
        self.untold.clear()


@dataclass(eq=False)
class Scoring(Row):
    """A row of which the likelihood of each token is wanted."""

    future: Future[tuple[float | None, ...]] = field(default_factory=Future)
    scores: list[float | None] = field(default_factory=lambda: [None])

    @property
    def over(self) -> bool:
        return self.future.cancelled()

    def next_chunk(self, size: int) -> Chunk:
        last = min(self.done // size * size + size, len(self.tokens))
        return Chunk(self.slot, self.tokens[self.done : last], self.done, self.loaded, "all", False)

    def take(self, logits: Tensor, first: int) -> None:
        """Add the log probabilities of the tokens after those from `first` on, (read, words)."""
        following = torch.tensor(self.tokens[first + 1 : first + 1 + len(logits)])
        logs = logits[: len(following)].log_softmax(-1)
        found = logs.gather(1, following[:, None].to(logs.device))
        self.scores += found[:, 0].tolist()

    def finish(self) -> None:
        self.future.set_result(tuple(self.scores))

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
