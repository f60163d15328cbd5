"""The requests of OpenAI's protocol that are served, each parameter checked.

A parameter that is not served is refused by its name, unless it says what holds anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

CHOICES = 16  # answers to one request, over all prompts
TOP_CHAT, TOP_COMPLETION = 20, 5  # OpenAI's own limits of likeliest tokens

# Parameters that are not served, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# These say who asks, and change no answer.
WHO_ASKS = ("user", "safety_identifier", "prompt_cache_key")


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
    """A JSON object in which every value is of the kind it should be, and nothing is unknown."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Asked(Strict):
    """What both kinds of requests have in common."""

    model: Annotated[str, Field(max_length=512)]
    adapters: Annotated[dict[str, Weight], Field(min_length=1, max_length=16)] | None = None
    """A mix, as adapters' names with their weights; `model` is then the base. Veneer's own."""
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if not (
                name in WHO_ASKS or (name in NEUTRAL and (value is None or value in NEUTRAL[name]))
            )
        }

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether the last chunk of a stream is to tell the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(Strict):
    """A part of a message; text is the only kind that is served."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """Return the content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_CHAT)] | None = None


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=CHOICES),
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
