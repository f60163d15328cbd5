"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Asking
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.serve.api.bridge import cancel, events_of
from veneer.serve.api.errors import ErrorBody, Fault
from veneer.serve.api.metrics import Counts
from veneer.serve.api.protocol import CHOICES, Asked, ChatRequest, CompletionRequest
from veneer.serve.api.replies import ChatReply, Choice, CompletionReply, Reply, usage_of
from veneer.serve.engine.request import Finished, Request
from veneer.serve.engine.served import Served, several
from veneer.serve.engine.stream import Stream

REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens for completions


def routes(served: Served, counts: Counts) -> APIRouter:
    """Return the routes below /v1 that clients of OpenAI call."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [model_of(n) for n in (served.name, *served.library.names())],
        }

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        served.known(model)
        return model_of(model)

    @router.post("/chat/completions", responses=STREAMED)
    async def chat(asked: ChatRequest, asking: Asking) -> Response:
        top = asked.top_logprobs
        if top and not asked.logprobs:
            raise Fault(400, "top_logprobs needs logprobs.", param="top_logprobs")

        adapter = served.adapter_of(asked)

        def prepare() -> list[list[Request]]:
            tokens = served.chat_tokens(asked.messages)
            most = asked.max_completion_tokens or asked.max_tokens
            logprobs = (top or 0) if asked.logprobs else None
            one = served.request(tokens, asked, adapter, most=most, usual=None, logprobs=logprobs)
            return [list(several(one, asked.n or 1))]

        reply = ChatReply(asked.model, served.text_of, logprobs=bool(asked.logprobs))
        return await respond(asked, prepare, reply, asking)

    @router.post("/completions", responses=STREAMED)
    async def completions(asked: CompletionRequest, asking: Asking) -> Response:
        if len(asked.prompts) * (asked.n or 1) > CHOICES:
            raise Fault(400, f"At most {CHOICES} answers can be asked for at once.", param="n")

        adapter = served.adapter_of(asked)

        def prepare() -> list[list[Request]]:
            rows = []
            for prompt in asked.prompts:
                one = served.request(
                    served.prompt_tokens(prompt),
                    asked,
                    adapter,
                    most=asked.max_tokens,
                    usual=COMPLETION_TOKENS,
                    logprobs=asked.logprobs,
                )
                rows.append(list(several(one, asked.n or 1)))
            return rows

        reply = CompletionReply(asked.model, served.text_of, logprobs=asked.logprobs is not None)
        return await respond(asked, prepare, reply, asking)

    def model_of(name: str) -> dict[str, Any]:
        is_base = name == served.name
        return {
            "id": name,
            "object": "model",
            "created": int(served.started),
            "owned_by": "veneer",
            "root": served.root if is_base else str(served.library.info(name).directory),
            "parent": None if is_base else served.name,
            "max_model_len": served.context,
        }

    async def respond(
        asked: Asked, prepare: Callable[[], list[list[Request]]], reply: Reply, asking: Asking
    ) -> Response:
        def begin() -> tuple[list[Stream], int]:
            rows = prepare()
            return served.submit([each for row in rows for each in row]), len(rows)

        # On another thread, for templates and tokenizers take their time.
        streams, prompts = await asyncio.to_thread(begin)
        if asked.stream:
            chunks = streamed(streams, prompts, reply, usage=asked.usage_in_stream, counts=counts)
            return Streaming(chunks, streams)
        choices = await unless_gone(collected(streams, counts), asking)
        if choices is None:
            return Response(status_code=499)  # nobody reads it
        ends = ends_of(choices)
        if failed := next((end for end in ends if end.reason == "error"), None):
            raise Fault(500, failed.error or "The answer failed.")
        return JSONResponse(reply.complete(choices, usage_of(ends, prompts)))

    return router


class Streaming(StreamingResponse):
    """Server-sent events whose answers end with the response, even one that never began."""

    def __init__(self, chunks: AsyncIterator[str], streams: Sequence[Stream]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.streams)


async def collected(streams: Sequence[Stream], counts: Counts) -> list[Choice]:
    """Return whole answers."""
    choices = [Choice() for _ in streams]
    async for number, event in counts.watch(events_of(streams)):
        choices[number].take(event)
    return choices


async def unless_gone(work: Any, asking: Asking) -> Any:
    """Return what `work` gives, or None as soon as whoever asked has gone, and end the work."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(asking))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(asking: Asking) -> None:
    while (await asking.receive())["type"] != "http.disconnect":
        pass


async def streamed(
    streams: Sequence[Stream], prompts: int, reply: Reply, *, usage: bool, counts: Counts
) -> AsyncIterator[str]:
    """Yield answers as server-sent events, as they are made."""
    more: dict[str, Any] = {"usage": None} if usage else {}
    choices = [Choice() for _ in streams]
    events = counts.watch(events_of(streams))
    try:
        for number in range(len(streams)):
            if opening := reply.opening(number):
                yield _event(reply.chunk(opening, **more))
        async for number, event in events:
            choice = choices[number]
            before = choice.text
            choice.take(event)
            if not isinstance(event, Finished):
                yield _event(reply.chunk(reply.piece(number, event, before), **more))
            elif event.reason == "error":
                yield _event(Fault(500, event.error or "The answer failed.").body())
            else:
                yield _event(reply.chunk(reply.ending(number, choice), **more))
        if usage:
            yield _event(reply.chunk(usage=usage_of(ends_of(choices), prompts)))
        yield "data: [DONE]\n\n"
    finally:
        await events.aclose()


def ends_of(choices: Sequence[Choice]) -> list[Finished]:
    """Return how each of the finished answers ended."""
    return [choice.end for choice in choices if choice.end is not None]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
