"""The requests of OpenAI's protocol that are served, each parameter checked.

A parameter that would change the answer and is not supported is refused by name. Two tables say
which others are accepted: with the values that ask for nothing, or ignored whatever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from veneer.data.rows import ROLES, Message
from veneer.errors import RequestError
from veneer.generate.sampling import Sampling
from veneer.serve.api.calls import MOST_CALLS
from veneer.serve.api.formats import (
    FORMATS,
    Choices,
    ResponseFormat,
    Schema,
    Source,
    StructuredOutputs,
    grammar_of,
)
from veneer.serve.api.strict import Strict, Text
from veneer.serve.api.tools import MOST_TOOLS, NamedTool, Tool, ToolCall, ToolChoice
from veneer.serve.engine.request import MOST_LOGPROBS, Adjustments, Grammar, Request, Which

MOST_ANSWERS = 16  # to one request, over all prompts
SEEDS = 2**63
MOST_NEW = 1_000_000  # tokens of an answer
BIASED = 4096  # tokens that one request may bias

# Parameters that are not supported, with the values that ask for nothing. So does null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": (),  # also "none": a template that knows it would think by itself
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # of completions, as the next one
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Parameters that change no answer, and why; the log names each once.
IGNORED: dict[str, str] = {
    "metadata": "answers are not stored",
    "prediction": "it would only make the answer come faster",
    "prompt_cache_key": "the cache finds prompts by their tokens",
    "prompt_cache_retention": "the cache keeps prompts while there is memory",
    "safety_identifier": "it names the caller",
    "store": "answers are not stored",
    "user": "it names the caller",
}


Count = Annotated[int, Field(ge=1, le=MOST_NEW)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # a token's id, as a key of JSON
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-16, le=16)]
Mix = Annotated[dict[str, Weight], Field(min_length=1, max_length=16)]


class StreamOptions(Strict):
    """What a stream contains beside the answer."""

    neutral: ClassVar = {"continuous_usage_stats": (False,)}
    ignored: ClassVar = {"include_obfuscation": "chunks are not padded"}

    include_usage: bool | None = None


class AnswerRequest(Strict):
    """What both kinds of requests for answers have in common."""

    neutral, ignored = NEUTRAL, IGNORED

    model: Annotated[str, Field(max_length=512)]
    adapters: Mix | None = None
    """A mix, as adapters' names with their weights; `model` is then the base. Veneer's own."""
    frequency_penalty: Penalty | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    guided_json: Schema | None = None
    guided_regex: Source | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=BIASED)] | None = None
    max_tokens: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    def requests(
        self,
        tokens: Sequence[int],
        adapter: Which,
        *,
        new_tokens: int,
        logprobs: int | None,
        grammar: Grammar | None = None,
        special: bool = False,
    ) -> list[Request]:
        """Return what the engine is asked for one prompt: `n` requests, each with its own seed.

        grammar: what the answer must be, where the request itself does not say.
        special: whether special tokens show in the text.
        """
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # -1 is vLLM's older name for none
            seed=self.seed,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        first = Request(
            tuple(tokens),
            adapter,
            sampling,
            adjustments=self.adjustments,
            grammar=self.grammar or grammar,
            special=special,
            stop=stop,
            logprobs=logprobs,
        )
        if self.seed is None:
            return [first] * (self.n or 1)
        seeds = [(self.seed + i + SEEDS) % (2 * SEEDS) - SEEDS for i in range(self.n or 1)]
        return [replace(first, sampling=replace(sampling, seed=seed)) for seed in seeds]

    @property
    def adjustments(self) -> Adjustments:
        """Return what changes the logits."""
        penalty = self.repetition_penalty
        return Adjustments(
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=1.0 if penalty is None else penalty,
            logit_bias=tuple((int(token), b) for token, b in (self.logit_bias or {}).items()),
            min_p=self.min_p or 0.0,
        )

    @property
    def grammar(self) -> Grammar | None:
        """Return what the answer must be, None where it may be anything."""
        asked = {name: getattr(self, name) for name in FORMATS if getattr(self, name) is not None}
        return grammar_of(asked)

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

    neutral: ClassVar = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }
    ignored: ClassVar = {"name": "chat templates get roles and contents alone"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextContent], Field(min_length=1)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and self.tool_calls is None:
            raise ValueError("should have content")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("should have tool_calls only where its role is assistant")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("should have tool_call_id where its role is tool, and nowhere else")
        return self

    @property
    def turn(self) -> Message:
        """Return the message as chat templates take it, its contents as one text."""
        contents = self.content or ""
        text = contents if isinstance(contents, str) else "".join(each.text for each in contents)
        fields: dict[str, object] = {}
        if self.tool_calls is not None:
            fields["tool_calls"] = [call.for_template for call in self.tool_calls]
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return Message(ROLES[self.role], text, fields=fields)


class ChatRequest(AnswerRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """Return the tools that the answer may call; `Strict` drops them where it must not."""
        return self.tools or []

    def called_tools(self) -> list[Tool]:
        """Return the tools of which the answer must call one; none where it need not.

        Raises RequestError for a choice that is none of the tools.
        """
        choice = self.tool_choice
        if choice is None or choice in ("none", "auto"):
            return []
        name = choice.function.name if isinstance(choice, NamedTool) else None
        tools = [t for t in self.callable_tools if name is None or t.function.name == name]
        if not tools:
            missing = "but there are none" if name is None else f"among which is no {name}"
            why = f"tool_choice asks for a call of one of the tools, {missing}."
            raise RequestError(why, param="tool_choice")
        return tools


class CompletionRequest(AnswerRequest):
    """POST /v1/completions."""

    neutral: ClassVar = {name: values for name, values in NEUTRAL.items() if name != "echo"}

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_ANSWERS),
        ]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_NEW)] | None = None
    return_tokens_as_token_ids: bool | None = None
    """Name tokens by their numbers where there are log probabilities of them. vLLM's own."""

    def check(self) -> None:
        """Raise RequestError for parameters that do not go together."""
        if len(self.prompts) * (self.n or 1) > MOST_ANSWERS:
            why = f"At most {MOST_ANSWERS} answers can be asked for at once."
            raise RequestError(why, param="n")
        if self.max_tokens == 0 and not self.scores_prompts:
            why = "max_tokens 0 gives log probabilities of the prompt; it needs echo and logprobs."
            raise RequestError(why, param="max_tokens")
        if self.return_tokens_as_token_ids and self.logprobs is None:
            why = "return_tokens_as_token_ids needs logprobs."
            raise RequestError(why, param="return_tokens_as_token_ids")
        if self.echo and self.stream:
            raise RequestError("echo is not supported in a stream.", param="echo")
        if self.scores_prompts and (self.n or 1) > 1:
            raise RequestError("With echo and logprobs, n must be 1.", param="n")

    @property
    def scores_prompts(self) -> bool:
        """Whether log probabilities of the prompts' own tokens are asked for."""
        return bool(self.echo) and self.logprobs is not None

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
