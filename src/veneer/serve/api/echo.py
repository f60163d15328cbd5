"""OpenAI's `echo`: a prompt before its completion, and how likely each of its tokens is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from veneer.errors import RequestError
from veneer.serve.api.protocol import CompletionRequest
from veneer.serve.engine.detokenizer import Detokenizer
from veneer.serve.engine.request import Answer, Request, Token, Which
from veneer.serve.engine.served import Served

# Tokens of all prompts of a request that are given back with log probabilities; one prompt may be
# as long as the context. Each takes about a kilobyte of the response with 20 likeliest tokens.
MOST_ECHOED = 8192


@dataclass(frozen=True)
class Echo:
    """A prompt as it is given back: its text, and its tokens, each with what it adds to that."""

    text: str
    tokens: Sequence[tuple[int, str]]

    @classmethod
    def of(cls, served: Served, prompt: str | list[int], which: Which) -> Echo:
        """Return the echo of a prompt that `Served.prompt_tokens` takes."""
        if isinstance(prompt, str):
            return cls(prompt, served.spans(prompt, which, special=True))
        detokenizer = Detokenizer(served.engine.vocabulary(which).tokenizer, (), special=True)
        tokens = [(token, detokenizer.add(token)[0]) for token in prompt]
        return cls("".join(text for _, text in tokens) + detokenizer.end(), tokens)

    def scoring(self, which: Which, logprobs: int) -> Request:
        """Return what the engine is asked for log probabilities of the prompt."""
        ids = tuple(token for token, _ in self.tokens)
        return Request(ids, which, prompt_logprobs=True, logprobs=logprobs)

    def before(self, answer: Answer, scored: Answer | None) -> Answer:
        """Return an answer with the prompt before it, which `scored` says the likelihood of."""
        if scored is None:
            return replace(answer, text=self.text + answer.text)
        scores = zip(self.tokens, scored.prompt_logprobs, scored.prompt_top, strict=True)
        tokens = (Token(token, text, own, top) for (token, text), own, top in scores)
        return replace(answer, text=self.text + answer.text, tokens=(*tokens, *answer.tokens))


def check_length(echoes: Sequence[Echo]) -> None:
    """Raise RequestError for prompts that are too long together to be scored in one request."""
    tokens = sum(len(echo.tokens) for echo in echoes)
    if len(echoes) > 1 and tokens > MOST_ECHOED:
        raise RequestError(
            f"The prompts have {tokens:,} tokens together, but {MOST_ECHOED:,} can be echoed with "
            "logprobs at once; ask for fewer prompts.",
            param="prompt",
        )


def with_prompts(
    asked: CompletionRequest, echoes: Sequence[Echo], answers: Sequence[Answer]
) -> list[Answer]:
    """Return the answers to a request as it is to show them. answers: `n` to each prompt, unless no
    tokens are asked for, and then one that scores each prompt, where that is asked for."""
    if not asked.echo:
        return list(answers)
    n, given = asked.n or 1, list(answers)
    scored: Sequence[Answer | None] = [None] * len(echoes)
    if asked.scores_prompts:
        given, scored = given[: -len(echoes)] or given, given[-len(echoes) :]
    return [echoes[i // n].before(answer, scored[i // n]) for i, answer in enumerate(given)]
