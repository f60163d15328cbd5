"""What is served: one base, its adapters, and how conversations and texts become its tokens."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from veneer.data.chat import Chat
from veneer.data.rows import Message
from veneer.errors import ContextExceeded, DataError, RequestError, UnknownModel, nearest
from veneer.formats.training import ComputedIn
from veneer.serve.engine.admission import mix_of
from veneer.serve.engine.base_weights import BaseWeights
from veneer.serve.engine.library import Library, Mix
from veneer.serve.engine.request import Request, Stats, Which
from veneer.serve.engine.stream import Stream, cancel
from veneer.serve.engine.vocabulary import Vocabulary


class EngineLike(Protocol):
    """What the server needs of an engine."""

    def submit(self, request: Request) -> Stream: ...

    def score(self, tokens: Sequence[int], adapter: Which = None) -> tuple[float | None, ...]: ...

    def vocabulary(self, which: Which) -> Vocabulary: ...

    def load(self, name: str) -> None: ...

    def refuse_unservable(self, since: int = 0) -> Mapping[str, str]: ...

    def close(self, *, drain: bool = True) -> None: ...

    @property
    def stats(self) -> Stats: ...


@dataclass
class Served:
    """One base with its engine and adapters. What raises RequestError says which parameter it is.

    name, root: what requests call the base, and where it came from.
    context: the most tokens that a prompt and its answer may have together, None without an end.
    computed_in: what the base is computed in.
    weights: the base's own, None where there are none to measure.
    """

    engine: EngineLike
    library: Library
    tokenizer: PreTrainedTokenizerBase
    name: str
    root: str
    context: int | None
    computed_in: ComputedIn
    weights: BaseWeights | None = None
    started: float = field(default_factory=time.time)

    def adapter(self, model: str, *, param: str = "model") -> str | None:
        """Return the adapter that a model's name means, None for the base.

        Raises UnknownModel, or RequestError for an adapter that cannot be served.
        """
        if model == self.name:
            return None
        if (entry := self.library.find(model)) is None:
            names = [self.name, *self.library.names()]
            hint = nearest(model[:200], names) or "; GET /v1/models lists all"
            message = f"The model {model[:200]!r} does not exist here{hint}."
            raise UnknownModel(message, param=param)
        if entry.refusal:
            raise RequestError(entry.refusal, param=param)
        return model

    def which(self, model: str, mix: Mapping[str, float] | None) -> Mix:
        """Return what is to answer: an adapter, a mix of adapters, or nothing for the base alone.

        These are the versions of this moment. Whoever encodes a prompt for them and has it answered
        by them later is not disturbed by an adapter that is replaced meanwhile, perhaps by one with
        other tokens. Raises RequestError for what is not here.
        """
        if mix is None:
            return mix_of(self.library, self.adapter(model))
        if model != self.name:
            raise RequestError(f"With adapters, model must be {self.name}.", param="model")
        for name in mix:
            if self.adapter(name, param="adapters") is None:
                raise RequestError(f"{name} is the base, not an adapter.", param="adapters")
        return mix_of(self.library, mix)

    def chat_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        which: Which = None,
    ) -> list[int]:
        """Return the tokens after which adapters answer a conversation, with tools that they may
        call. Raises RequestError where the chat template refuses the messages, or writes no tools.
        """
        chat = Chat(self.tokenizer)
        try:
            text = chat.render(messages, tools, prompt=True)
            writes_tools = not tools or text != chat.render(messages, prompt=True)
        except DataError as error:
            raise RequestError(f"{error}.", param="messages") from error
        except TypeError as error:  # of a template that has other ideas of a call
            why = f"the model's chat template cannot write the messages: {error}."
            raise RequestError(why, param="messages") from error
        if not writes_tools:
            why = "the model's chat template writes no tools."
            raise RequestError(f"tools cannot be followed: {why}", param="tools")
        return self.encode(text, special=False, which=which)

    def prompt_tokens(
        self, prompt: str | list[int], *, param: str = "prompt", which: Which = None
    ) -> list[int]:
        """Return the tokens of a prompt that is text, or tokens already. Raises RequestError."""
        if isinstance(prompt, str):
            tokens = self.encode(prompt, special=True, which=which)
            if not tokens:
                raise RequestError("The prompt is empty.", param=param)
            return tokens
        size = self.engine.vocabulary(which).size
        if (largest := max(prompt)) >= size:
            raise RequestError(
                f"The prompt has the token {largest}, but the model has {size:,}.", param=param
            )
        return prompt

    def encode(self, text: str, *, special: bool, which: Which = None) -> list[int]:
        """Return the tokens of a text for adapters. Raises ContextExceeded for one that no context
        can hold."""
        own, context = self.engine.vocabulary(which), self.context_of(which)
        least = -(-len(text) // own.longest)
        if context is not None and least > context:
            # Tokenising a book only to refuse it would keep everybody waiting.
            raise self._too_long(f"at least {least:,}", which)
        # As a batch, for the tokenizer holds no lock while it works on one.
        return list(own.tokenizer([text], add_special_tokens=special)["input_ids"][0])

    def spans(
        self, text: str, which: Which = None, *, special: bool = False
    ) -> list[tuple[int, str]]:
        """Return the tokens of a text for adapters, each with its characters; where several tokens
        make up one character, the first has it and the others have nothing."""
        self.encode(text, special=special, which=which)
        tokenizer = self.engine.vocabulary(which).tokenizer
        encoded = tokenizer([text], add_special_tokens=special, return_offsets_mapping=True)
        spans, done = [], 0
        for token, (_, end) in zip(
            encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True
        ):
            spans.append((token, text[done:end]))
            done = max(done, end)
        return spans

    def context_of(self, which: Which) -> int | None:
        """Return the most tokens that a text and its answer may have together for adapters, whose
        virtual tokens take some of the context."""
        own = self.engine.vocabulary(which)
        return None if self.context is None else self.context - own.virtual

    def check_context(self, tokens: Sequence[int], which: Which = None) -> None:
        """Raise ContextExceeded, with both numbers, where not one more token would fit."""
        context = self.context_of(which)
        if context is not None and len(tokens) >= context:
            raise self._too_long(f"{len(tokens):,}", which)

    def new_tokens(
        self,
        prompt: Sequence[int],
        most: int | None,
        default: int | None,
        *,
        which: Which = None,
    ) -> int:
        """Return how many tokens an answer may have: `most`, or the default where that is None.

        Raises ContextExceeded, with both numbers, where prompt and answer are too long together.
        """
        self.check_context(prompt, which)
        context = self.context_of(which)
        if context is None:
            return most or default or 1024
        left = context - len(prompt)
        if most is not None and most > left:
            raise ContextExceeded(
                f"This model's context is {context:,} tokens, but {len(prompt):,} of the "
                f"prompt and {most:,} of the answer are {len(prompt) + most:,}.",
                param="max_tokens",
            )
        return most or min(left, default or left)

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

    def text_of(self, which: Which) -> Callable[[int], str]:
        """Return what gives the text of one token of an adapter's answers by itself."""
        tokenizer = self.engine.vocabulary(which).tokenizer
        return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def compared(
        self, messages: Sequence[Message], answer: str, adapter: Which
    ) -> Iterator[tuple[str, float, float]]:
        """Yield an answer's tokens, each with its log probability by the base and by an adapter.

        Where the adapter has other tokens than the base, as many as make up the same text are one.
        Raises as `check_context` and `Engine.score` do.
        """
        scored = []
        for which in (None, adapter):
            prompt = self.chat_tokens(messages, which=which)
            spans = self.spans(answer, which)
            tokens = [*prompt, *(token for token, _ in spans)]
            self.check_context(tokens, which)
            scores = self.engine.score(tokens, which)[len(prompt) :]
            texts = [text for _, text in spans]
            scored.append([(t, s or 0.0) for t, s in zip(texts, scores, strict=True)])
        base, own = scored
        if [text for text, _ in base] == [text for text, _ in own]:
            for (text, first), (_, second) in zip(base, own, strict=True):
                yield text, first, second
            return
        ends = [{*accumulate(len(text) for text, _ in each)} for each in scored]
        common = sorted((ends[0] & ends[1]) - {0} | {len(answer)})
        sums = [_sums_up_to(common, each) for each in scored]
        for (start, end), first, second in zip(pairwise([0, *common]), *sums, strict=True):
            yield answer[start:end], first, second

    def _too_long(self, tokens: str, which: Which) -> ContextExceeded:
        return ContextExceeded(
            f"This model's context is {self.context_of(which):,} tokens, but the prompt has "
            f"{tokens}, which leaves no room for an answer."
        )


def _sums_up_to(ends: Sequence[int], scored: Sequence[tuple[str, float]]) -> list[float]:
    """Return the log probability of the tokens up to each of these ends, from the end before it on.
    The ends, in characters, are ends of tokens, and the last is the text's."""
    sums, at = [0.0] * len(ends), 0
    for text, score in scored:
        at += len(text)
        sums[bisect_left(ends, at)] += score
    return sums
