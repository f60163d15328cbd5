"""What is served: one base, its adapters, and how a request becomes tokens for the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from veneer.data.chat import prompt_text
from veneer.data.rows import ROLES, Message
from veneer.errors import DataError, nearest
from veneer.generate.sampling import Sampling
from veneer.serve.api.bridge import cancel
from veneer.serve.api.errors import Fault
from veneer.serve.api.protocol import Asked, ChatMessage
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Request, Stats, Which
from veneer.serve.engine.stream import Stream

SEEDS = 2**63


class EngineLike(Protocol):
    """What the server needs of an engine."""

    def submit(self, request: Request) -> Stream: ...

    def score(self, tokens: Sequence[int], adapter: Which = None) -> tuple[float | None, ...]: ...

    def load(self, name: str) -> None: ...

    @property
    def stats(self) -> Stats: ...


@dataclass
class Served:
    """One base with its engine and adapters, as the routes see them.

    name, root: what requests call the base, and where it came from.
    context: the most tokens that a prompt and its answer may have together, None without an end.
    """

    engine: EngineLike
    library: Library
    tokenizer: PreTrainedTokenizerBase
    name: str
    root: str
    context: int | None
    vocabulary: int
    started: float = field(default_factory=time.time)

    def adapter_of(self, asked: Asked) -> Which:
        """Return which adapter a request wants. Raises Fault for one that is not here."""
        if asked.adapters is None:
            return self.known(asked.model)
        if asked.model != self.name:
            raise Fault(400, f"With adapters, model must be {self.name}.", param="model")
        for each in asked.adapters:
            if self.known(each, param="adapters") is None:
                raise Fault(400, f"{each} is the base, not an adapter.", param="adapters")
        return dict(asked.adapters)

    def known(self, model: str, *, param: str = "model") -> str | None:
        """Return the adapter that a model's name means, None for the base."""
        if model == self.name:
            return None
        names = self.library.names()
        if model not in names:
            like = nearest(model[:200], [self.name, *names]) or "; GET /v1/models lists all"
            said = f"The model {model[:200]!r} does not exist here{like}."
            raise Fault(404, said, param=param, code="model_not_found")
        return model

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the tokens after which the model answers a conversation."""
        turns = [Message(ROLES[message.role], message.text) for message in messages]
        try:
            text = prompt_text(self.tokenizer, turns)
        except DataError as error:
            raise Fault(400, f"{error}.", param="messages") from error
        return self.encode(text, special=False)

    def prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        """Return the tokens of a prompt that is text, or tokens already."""
        if isinstance(prompt, str):
            tokens = self.encode(prompt, special=True)
            if not tokens:
                raise Fault(400, "The prompt is empty.", param="prompt")
            return tokens
        if (largest := max(prompt)) >= self.vocabulary:
            raise Fault(
                400,
                f"The prompt has the token {largest}, but the model knows {self.vocabulary:,}.",
                param="prompt",
            )
        return prompt

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text. Raises Fault for a text that no context could hold."""
        at_least = -(-len(text) // _longest_token(self.tokenizer))
        if self.context is not None and at_least > self.context:
            # Tokenising a book only to refuse it would keep everybody waiting.
            raise self._too_long(f"at least {at_least:,}")
        # As a batch, for the tokenizer holds no lock while it works on one.
        return list(self.tokenizer([text], add_special_tokens=special)["input_ids"][0])

    def spans(self, text: str) -> list[tuple[int, str]]:
        """Return the tokens of a text, each with its part of it; where several make up one
        character, the first has it and the others have nothing."""
        self.encode(text, special=False)
        encoded = self.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
        found, done = [], 0
        for token, (_, end) in zip(
            encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True
        ):
            found.append((token, text[done:end]))
            done = max(done, end)
        return found

    def check_context(self, tokens: Sequence[int]) -> None:
        """Raise Fault, with both numbers, for a text that leaves no room for one token more."""
        if self.context is not None and len(tokens) >= self.context:
            raise self._too_long(f"{len(tokens):,}")

    def request(
        self,
        tokens: Sequence[int],
        asked: Asked,
        adapter: Which,
        *,
        most: int | None,
        usual: int | None,
        **more: Any,
    ) -> Request:
        """Return what the engine is asked. `most` new tokens were asked for, else `usual` holds.

        Raises Fault, with both numbers, where prompt and answer are longer than the context.
        """
        self.check_context(tokens)
        if self.context is not None:
            room = self.context - len(tokens)
            if most is not None and most > room:
                raise Fault(
                    400,
                    f"This model's context is {self.context:,} tokens, but {len(tokens):,} of the "
                    f"prompt and {most:,} of the answer are {len(tokens) + most:,}.",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            usual = min(room, usual or room)
        sampling = Sampling(
            max_new_tokens=most or usual or 1024,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
        )
        return Request(tuple(tokens), adapter, sampling, asked.stops, **more)

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Give requests to the engine, all of them or none."""
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except BaseException:
            cancel(streams)
            raise
        return streams

    def text_of(self, token: int) -> str:
        """Return the text of one token by itself."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _too_long(self, tokens: str) -> Fault:
        return Fault(
            400,
            f"This model's context is {self.context:,} tokens, but the prompt has {tokens}, which "
            "leaves no room for an answer.",
            code="context_length_exceeded",
        )


def several(request: Request, n: int) -> Iterator[Request]:
    """Yield a request `n` times, each time with the next seed where it has one."""
    seed = request.sampling.seed
    for i in range(n):
        if seed is None or i == 0:
            yield request
        else:
            following = (seed + i + SEEDS) % (2 * SEEDS) - SEEDS
            yield replace(request, sampling=replace(request.sampling, seed=following))


@lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the characters of the longest token: a text has at least its length / that tokens."""
    return max(map(len, tokenizer.get_vocab()))
