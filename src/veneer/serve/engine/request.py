"""What is asked of the engine and what it answers: frozen values that import no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from veneer.errors import ConfigError, RequestError
from veneer.generate.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "error"]
Which = str | Mapping[str, float] | None  # an adapter's name, a weighted mix, or the base alone
MOST_LOGPROBS = 20  # as in OpenAI's interface


@dataclass(frozen=True)
class Request:
    """A prompt, which adapter answers it, and how.

    Raises RequestError, which lists everything that is wrong at once.
    """

    tokens: tuple[int, ...]
    """The prompt."""
    adapter: Which = None
    """An adapter's name, a mix as names to weights, or None for the base alone."""
    sampling: Sampling = field(default_factory=Sampling)
    """How each next token is chosen, and how many there may be."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    logprobs: int | None = None
    """How many of the likeliest tokens to give beside each token's own; None gives neither."""

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
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that is sure to belong to the answer, and the tokens that it is made of."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """Why an answer ended, and what it took. cached_tokens: of the prompt, those not computed."""

    reason: Reason
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    error: str = ""


Event = Piece | Finished


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
    """Tokens of prompts that are read between two steps of the running answers."""
    cache_bytes: int = 2**30
    """Memory for the keys and values of prompts' beginnings."""
    adapter_bytes: int = 4 * 2**30
    """Memory for adapters that are ready to act."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, but must be at least {least}"
            for name, value, least in (
                ("slots", self.slots, 1),
                ("context", self.context, 2),
                ("queue", self.queue, 0),
                ("chunk", self.chunk, 16),
                ("cache_bytes", self.cache_bytes, 0),
                ("adapter_bytes", self.adapter_bytes, 0),
            )
            if value is not None and value < least
        ]
        if self.chunk % 16:
            problems.append(f"chunk is {self.chunk}, but must be a multiple of 16")
        if problems:
            raise ConfigError("There can be no such engine: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Stats:
    """Where an engine stands, and what it did since it started."""

    active: int
    """Requests in a slot."""
    waiting: int
    """Requests without one."""
    slots: int
    requests: int
    """Answered to the end, whatever the end was."""
    prompt_tokens: int
    """Of prompts, computed."""
    cached_tokens: int
    """Of prompts, taken from the cache."""
    new_tokens: int
    steps: int
    """Passes through the model."""
    cache_bytes: int
    resident: tuple[str, ...]
    """Adapters that are ready to act, the one used last at the end."""
    resident_bytes: int
    evicted: int
    """Adapters that made room for others."""
