"""Answers in OpenAI's shapes, whole and in chunks. Dictionaries in, dictionaries out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from veneer.serve.engine.request import Finished, Piece, Token

TextOf = Callable[[int], str]  # the text of a token by its number
LEAST = -9999.0  # what OpenAI says for the logarithm of nothing, which JSON cannot


@dataclass
class Choice:
    """One answer as it grows."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None

    def take(self, event: Piece | Finished) -> None:
        """Add what has come."""
        if isinstance(event, Finished):
            self.end = event
        else:
            self.text += event.text
            self.tokens += event.tokens

    @property
    def reason(self) -> str:
        """Return why it ended: "length" also where the server had to cut it."""
        return "stop" if self.end is not None and self.end.reason == "stop" else "length"


def usage_of(ends: Sequence[Finished], prompts: int) -> dict[str, Any]:
    """Return the tokens used by answers to `prompts` prompts, in turn and equally many to each."""
    each = len(ends) // prompts
    prompt = sum(end.prompt_tokens for end in ends[::each])  # one prompt counts once
    new = sum(end.new_tokens for end in ends)
    cached = sum(end.cached_tokens for end in ends[::each])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply:
    """How answers to a request are written; the two kinds differ in what a choice holds."""

    prefix, whole, part = "", "", ""

    def __init__(self, model: str, text_of: TextOf, *, logprobs: bool) -> None:
        self.text_of, self.logprobs = text_of, logprobs
        self.head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time())}
        self.head["model"] = model

    def complete(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer."""
        shown = [
            {"index": i, **self.content(c), "finish_reason": c.reason}
            for i, c in enumerate(choices)
        ]
        return {**self.head, "object": self.whole, "choices": shown, "usage": usage}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return a part of a stream."""
        return {**self.head, "object": self.part, "choices": list(choices), **more}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice that opens a stream, if there is one."""
        raise NotImplementedError

    def content(self, choice: Choice) -> dict[str, Any]:
        """Return what a whole choice holds."""
        raise NotImplementedError

    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any]:
        """Return the choice that carries a piece of an answer, of which `before` has come."""
        raise NotImplementedError

    def ending(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return the choice that ends an answer."""
        raise NotImplementedError


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def content(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens)}

    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any]:
        return self._delta(index, {"content": piece.text}, logprobs=self._logprobs(piece.tokens))

    def ending(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._delta(index, {}, reason=choice.reason)

    def _delta(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **_token(token.text, token.logprob),
                "top_logprobs": [_token(self.text_of(i), logprob) for i, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """Answers of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> None:
        return None

    def content(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice.tokens, 0)}

    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens, len(before))
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, choice: Choice) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": choice.reason}

    def _logprobs(self, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self.text_of(i): _finite(logprob) for i, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # A token that is part of a character has no text of its own, and its bytes are not known.
    known = list(text.encode()) if "\ufffd" not in text else None
    return {"token": text, "logprob": _finite(logprob), "bytes": known}


def _finite(logprob: float | None) -> float:
    assert logprob is not None  # they were asked for
    return max(LEAST, logprob)
