"""The requests of OpenAI's protocol that are served, each parameter checked.

A parameter that would change the answer and is not supported is refused by name. Two tables say
which others are accepted: with the values that ask for nothing, or ignored whatever they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from veneer.data.rows import ROLES, Message
from veneer.generate.sampling import Sampling
from veneer.serve.engine.request import Request, Which

MOST_ANSWERS = 16  # to one request, over all prompts
SEEDS = 2**63
TOP_CHAT, TOP_COMPLETION = 20, 5  # OpenAI's own limits of likeliest tokens

log = logging.getLogger("veneer.serve")

# Parameters that are not supported, with the values that ask for nothing. So does null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),  # also "none": a template that knows it would think by itself
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Parameters that change no answer, and why; the log names each once.
IGNORED: dict[str, str] = {
    "metadata": "answers are not stored",
    "parallel_tool_calls": "there are no tools to call",
    "prediction": "it would only make the answer come faster",
    "prompt_cache_key": "the cache finds prompts by their tokens",
    "prompt_cache_retention": "the cache keeps prompts while there is memory",
    "safety_identifier": "it names the caller",
    "store": "answers are not stored",
    "user": "it names the caller",
}
# Tools, with the parameter that is "none" where the model must not call them.
NOT_TO_CALL = {"tools": "tool_choice", "functions": "function_call"}


@cache
def _note(name: str, why: str) -> None:
    """Write into the log, once, that a parameter is ignored."""
    log.info("The parameter %s is ignored: %s.", name, why)


def _whole(text: str) -> str:
    """Refuse half a character, which JSON can say and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-16, le=16)]


class Strict(BaseModel):
    """A JSON object: every value has the type it should have, and no name is unknown.

    neutral: names that are accepted with some values. ignored: names that always are, and why.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        unused = {
            name: f'{choice} is "none"'
            for name, choice in NOT_TO_CALL.items()
            if name in cls.neutral and body.get(choice) == "none"
        }
        ignored = {**cls.ignored, **unused}
        kept = {}
        for name, value in body.items():
            if name in ignored:
                if value:  # false, null and nothing ask for nothing
                    _note(name, ignored[name])
            elif name not in cls.neutral or not (value is None or value in cls.neutral[name]):
                kept[name] = value
        return kept


class StreamOptions(Strict):
    """What a stream contains beside the answer."""

    neutral = {"continuous_usage_stats": (False,)}
    ignored = {"include_obfuscation": "chunks are not padded"}

    include_usage: bool | None = None


class AnswerRequest(Strict):
    """What both kinds of requests for answers have in common."""

    neutral, ignored = NEUTRAL, IGNORED

    model: Annotated[str, Field(max_length=512)]
    adapters: Annotated[dict[str, Weight], Field(min_length=1, max_length=16)] | None = None
    """A mix, as adapters' names with their weights; `model` is then the base. Veneer's own."""
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    def requests(
        self, tokens: Sequence[int], adapter: Which, *, new_tokens: int, logprobs: int | None
    ) -> list[Request]:
        """Return what the engine is asked for one prompt: `n` requests, each with its own seed."""
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        first = Request(tuple(tokens), adapter, sampling, stop, logprobs)
        if self.seed is None:
            return [first] * (self.n or 1)
        seeds = [(self.seed + i + SEEDS) % (2 * SEEDS) - SEEDS for i in range(self.n or 1)]
        return [replace(first, sampling=replace(sampling, seed=seed)) for seed in seeds]

    @property
    def usage_in_stream(self) -> bool:
        """Whether the last chunk of a stream is to hold the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextContent(Strict):
    """One of the contents of a message; text is the only kind that is served."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn of a conversation. An answer of ours can be sent back as it is."""

    neutral = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }
    ignored = {"name": "chat templates get roles and contents alone"}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextContent], Field(min_length=1)]

    @property
    def turn(self) -> Message:
        """Return the message as chat templates take it, its contents as one text."""
        contents = self.content
        text = contents if isinstance(contents, str) else "".join(each.text for each in contents)
        return Message(ROLES[self.role], text)


class ChatRequest(AnswerRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_CHAT)] | None = None


class CompletionRequest(AnswerRequest):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_ANSWERS),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=TOP_COMPLETION)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class LoadRequest(Strict):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(Strict):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = None


class TokensRequest(Strict):
    """POST /api/tokens: how likely each token of an answer is, with an adapter and without."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    answer: Annotated[Text, Field(min_length=1)]
