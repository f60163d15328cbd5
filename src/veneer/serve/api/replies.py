"""Answers in OpenAI's shapes, whole and in chunks. Values in, dictionaries out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import uuid4

from veneer.serve.api.calls import MOST_CALLS, Call, CallReader
from veneer.serve.engine.request import Answer, Token

LEAST = -9999.0  # OpenAI's stand-in for the logarithm of 0, which JSON cannot express


def usage_of(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Return the tokens used by answers to several prompts, `n` of them to each, in order."""
    prompt = sum(answer.prompt_tokens for answer in answers[::n])  # one prompt counts once
    new = sum(answer.new_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply(ABC):
    """How the answers to one request are written. text_of: the text of a token by its id."""

    prefix: str  # of the id
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, text_of: Callable[[int], str], *, logprobs: bool) -> None:
        self.text_of, self.logprobs = text_of, logprobs
        self.head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time())}
        self.head["model"] = model

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the response that holds whole answers."""
        choices = [
            {"index": i, **content, "finish_reason": self.finish_reason(content, answer)}
            for i, answer in enumerate(answers)
            for content in [self.content(answer)]
        ]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return one event of a stream."""
        return {**self.head, "object": self.chunk_object, "choices": list(choices), **more}

    @abstractmethod
    def content(self, answer: Answer) -> dict[str, Any]:
        """Return what the choice of a whole answer holds."""

    def finish_reason(self, content: dict[str, Any], answer: Answer) -> str:
        """Return why an answer ended, whose choice holds `content`."""
        return _finish_reason(answer)

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice that opens a stream, if there is one."""

    @abstractmethod
    def delta(self, index: int, piece: Answer, start: int) -> dict[str, Any] | None:
        """Return the choice with the text of a piece, before which `start` characters came; None
        where nothing of it is sure yet."""

    @abstractmethod
    def ending(self, index: int, piece: Answer) -> dict[str, Any]:
        """Return the choice that ends an answer."""


class ChatReply(Reply):
    """Answers of /v1/chat/completions. readers: makes what reads calls from an answer's text, None
    where it may have none. most_calls: how many of them count."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        text_of: Callable[[int], str],
        *,
        logprobs: bool,
        readers: Callable[[], CallReader] | None = None,
        most_calls: int = MOST_CALLS,
    ) -> None:
        super().__init__(model, text_of, logprobs=logprobs)
        self._make_reader, self._most_calls = readers, most_calls
        self._readers: dict[int, CallReader] = {}  # by choice

    def content(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._make_reader is not None:
            reader = self._make_reader()
            content, calls = reader.feed(answer.text)
            content += reader.end()
            if calls:
                message["content"] = content.strip() or None
                message["tool_calls"] = [_tool_call(call) for call in calls[: self._most_calls]]
        return {"message": message, "logprobs": self._logprobs(answer.tokens)}

    def finish_reason(self, content: dict[str, Any], answer: Answer) -> str:
        return _finish_reason(answer, has_calls="tool_calls" in content["message"])

    def opening(self, index: int) -> dict[str, Any]:
        return self._choice(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, piece: Answer, start: int) -> dict[str, Any] | None:
        logprobs = self._logprobs(piece.tokens)
        if self._make_reader is None:
            return self._choice(index, {"content": piece.text}, logprobs=logprobs)
        reader = self._readers.setdefault(index, self._make_reader())
        before = reader.calls
        content, calls = reader.feed(piece.text)
        delta: dict[str, Any] = {"content": content} if content else {}
        if shown := calls[: max(0, self._most_calls - before)]:
            delta["tool_calls"] = [
                {"index": before + n, **_tool_call(call)} for n, call in enumerate(shown)
            ]
        return self._choice(index, delta, logprobs=logprobs) if delta or logprobs else None

    def ending(self, index: int, piece: Answer) -> dict[str, Any]:
        reader = self._readers.get(index)
        rest = "" if reader is None else reader.end()
        reason = _finish_reason(piece, has_calls=reader is not None and reader.calls > 0)
        return self._choice(index, {"content": rest} if rest else {}, reason=reason)

    def _choice(
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
    """Answers of /v1/completions. as_ids: whether log probabilities name tokens by their numbers,
    as vLLM writes them; texts may be those of several tokens."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, text_of: Callable[[int], str], *, logprobs: bool, as_ids: bool = False
    ) -> None:
        super().__init__(model, text_of, logprobs=logprobs)
        self.as_ids = as_ids

    def content(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": self._logprobs(answer.tokens, 0)}

    def opening(self, index: int) -> None:
        return None

    def delta(self, index: int, piece: Answer, start: int) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens, start)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, piece: Answer) -> dict[str, Any]:
        reason = _finish_reason(piece)
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(token.text)
        # Nothing comes before the first token of a prompt, which so has no probability.
        return {
            "tokens": [self._name(token, token.id) for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else _finite(token.logprob) for token in tokens
            ],
            "top_logprobs": [
                None
                if token.logprob is None
                else {self._name(token, i): _finite(logprob) for i, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, token: Token, i: int) -> str:
        """Return what a token is called in the place of `token`, which has one name there."""
        if self.as_ids:
            return f"token_id:{i}"
        return token.text if i == token.id else self.text_of(i)


def _tool_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _finish_reason(answer: Answer, *, has_calls: bool = False) -> str:
    # "length" also where the server had to cut the answer: OpenAI has no word for that. Behind the
    # calls of an answer that was cut there may have been more.
    if answer.reason != "stop":
        return "length"
    return "tool_calls" if has_calls else "stop"


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # A token that is only a piece of a character has no text of its own, and its bytes are unknown.
    utf8 = list(text.encode()) if "\ufffd" not in text else None
    return {"token": text, "logprob": _finite(logprob), "bytes": utf8}


def _finite(logprob: float | None) -> float:
    assert logprob is not None  # they were asked for
    return max(LEAST, logprob)
