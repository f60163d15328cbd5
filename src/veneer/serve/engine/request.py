"""What the engine is asked and what it answers: frozen values that import no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from veneer.checks import Rule, at_least, check_config
from veneer.errors import ConfigError, RequestError
from veneer.generate.sampling import Sampling
from veneer.models.context import own_context
from veneer.serve.engine.library import Mix

Reason = Literal["stop", "length", "cancelled", "error"]
# An adapter's name, a weighted mix, either as versions that were looked up, or the base alone.
Which = str | Mapping[str, float] | Mix | None
MOST_LOGPROBS = 20  # as in OpenAI's interface
LONGEST_CONTEXT = 4096  # tokens of a context, unless the configuration says otherwise
DRAFTED = 16  # tokens that are guessed at most, unless the configuration says otherwise
CHUNK_MULTIPLE = 16  # compiled steps keep keys in blocks of 16 tokens


@dataclass(frozen=True)
class Adjustments:
    """What changes a row's logits before its sampler draws, each as vLLM defines it."""

    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer has it."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the answer has."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies any other, of tokens in the prompt or the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens with what is added to their logits."""
    min_p: float = 0.0
    """Draw only from tokens that are at least this share as likely as the likeliest."""

    @property
    def of_logits(self) -> bool:
        """Whether any logit changes, so that the likeliest token may be another."""
        return bool(self.logit_bias) or self.penalizes

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens a row has so far."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: JSON of a schema (the schema's own JSON), text that a regular
    expression matches whole, or text of a grammar in Lark's form or llama.cpp's GBNF."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str = field(repr=False)
    asked_by: str = "grammar"
    """The parameter that asks for it, for messages."""


@dataclass(frozen=True)
class Request:
    """A prompt, which adapter answers it, and how.

    Raises RequestError, which lists everything that is wrong at once.
    """

    tokens: tuple[int, ...]
    """The prompt."""
    adapter: Which = None
    """An adapter's name, a mix as names to weights, the versions that these mean, or None for the
    base alone."""
    sampling: Sampling = field(default_factory=Sampling)
    """How each next token is chosen, and how many there may be."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    logprobs: int | None = None
    """How many of the likeliest tokens to give beside each token's own; None gives neither."""
    prompt_logprobs: bool = False
    """Give the log probability of each token of the prompt instead of an answer; with `logprobs`,
    those of the likeliest tokens in its place too."""
    adjustments: Adjustments = field(default_factory=Adjustments)
    """What changes the logits before a token is chosen."""
    grammar: Grammar | None = None
    """What the answer must be, if anything."""
    special: bool = False
    """Let special tokens show in the text."""
    embedding: Literal["mean", "last"] | None = None
    """Give the prompt's embedding instead of an answer: over all of its tokens, or of its last."""

    @property
    def answers(self) -> bool:
        """Whether the request is for an answer, and not for something about its prompt."""
        return not self.prompt_logprobs and self.embedding is None

    @property
    def reads_all(self) -> bool:
        """Whether something of each token of the prompt is asked for."""
        return self.prompt_logprobs or self.embedding == "mean"

    def __post_init__(self) -> None:
        problems = []
        if not self.tokens:
            problems.append("the prompt is empty")
        if any(not text for text in self.stop):
            problems.append("a stop text is empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            problems.append(f"logprobs is {self.logprobs}, but must be 0 to {MOST_LOGPROBS}")
        if isinstance(self.adapter, Mapping):
            wrong = [f"{n}: {w}" for n, w in self.adapter.items() if not abs(w) < float("inf")]
            if wrong:
                problems.append(f"a mix needs finite weights, not {', '.join(wrong)}")
            # A copy that nobody changes, for the request outlives the call.
            object.__setattr__(self, "adapter", MappingProxyType(dict(self.adapter)))
        if problems:
            raise RequestError("This cannot be answered: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Token:
    """A token of an answer. logprob and top, the likeliest with theirs, only where asked for."""

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer, whole or a piece of it as it is made. Only the last piece has a reason."""

    text: str = ""
    """Text that is sure to belong to the answer: whole characters, and nothing of a stop text."""
    tokens: tuple[Token, ...] = ()
    """The tokens that the text is made of."""
    reason: Reason | None = None
    """Why the answer ended."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values came from the prefix cache."""
    new_tokens: int = 0
    """Tokens that were generated, the one that ended the answer among them."""
    prompt_logprobs: tuple[float | None, ...] = ()
    """Where asked for: of each token of the prompt after those before it; None for the first."""
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Where asked for: the likeliest in the place of each, with theirs; none for the first."""
    error: Exception | None = None
    """What failed, where the reason is "error"."""
    embedding: tuple[float, ...] = ()
    """Where asked for: of the prompt, of length 1."""

    @classmethod
    def joined(cls, pieces: Sequence[Answer]) -> Answer:
        """Return the whole answer that `pieces` are, from the first to the last."""
        text = "".join(piece.text for piece in pieces)
        return replace(pieces[-1], text=text, tokens=tuple(t for p in pieces for t in p.tokens))


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may take of the machine. Raises ConfigError for what cannot be."""

    slots: int = 16
    """Requests that are computed at the same time."""
    context: int | None = None
    """Tokens of a prompt with its answer; the model's own context, at most 4096, unless given."""
    queue: int = 256
    """Requests that may wait for a slot; more are refused."""
    chunk: int = 64
    """Tokens of prompts that a step computes at most, and of a prefix block."""
    speculate: int | None = None
    """Tokens that are guessed behind a row's newest one and computed with it, at most; 16 unless
    given, where the runner is exact."""
    cache_bytes: int = 2**30
    """Memory for the keys and values of prefix blocks."""
    cache_directory: Path | None = None
    """Where prefix blocks are kept for later engines over the same base."""
    cache_file_bytes: int = 10 * 10**9
    """Space for the files there, those of other bases among them."""
    adapter_bytes: int = 4 * 2**30
    """Memory for adapters that are ready to act."""

    def __post_init__(self) -> None:
        multiple = Rule(
            lambda value: value >= CHUNK_MULTIPLE and value % CHUNK_MULTIPLE == 0,
            f"a multiple of {CHUNK_MULTIPLE}",
        )
        check_config(
            self,
            opening="There can be no such engine",
            rules={
                "slots": at_least(1),
                "context": at_least(2),
                "queue": at_least(0),
                "chunk": multiple,
                "speculate": at_least(0),
                "cache_bytes": at_least(0),
                "cache_file_bytes": at_least(0),
                "adapter_bytes": at_least(0),
            },
        )

    def context_of(self, model: object) -> int:
        """Return the context over a model, whose configuration this is. Raises ConfigError where
        the model's own is shorter than what was asked for."""
        own = own_context(model)
        if own is not None and self.context is not None and self.context > own:
            raise ConfigError(f"context is {self.context:,}, but this model's is {own:,}.")
        longest = LONGEST_CONTEXT if self.context is None else self.context
        return longest if own is None else min(own, longest)


@dataclass(frozen=True)
class Stats:
    """The engine's state, and what it did since it started. /metrics shows each by its name."""

    active: int
    """Requests in a slot."""
    waiting: int
    """Requests without one."""
    slots: int
    requests: int
    """Requests that ended, for whatever reason."""
    prompt_tokens: int
    """Tokens of prompts that were computed."""
    cached_tokens: int
    """Tokens of prompts that came from the prefix cache."""
    new_tokens: int
    drafted_tokens: int
    """Tokens that were guessed, and computed behind those that rows had."""
    accepted_tokens: int
    """How many of these were right."""
    steps: int
    """Passes through the model."""
    cache_bytes: int
    resident: tuple[str, ...]
    """Adapters in the adapter cache, the most recently used one last."""
    resident_bytes: int
    evicted: int
    """Adapters that were dropped from the cache to keep its limit."""
    stored_bytes: int = 0
    """Prefix blocks in files."""
