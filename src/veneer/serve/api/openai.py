"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.errors import AdapterError, RequestError
from veneer.serve.api.calling import Tools
from veneer.serve.api.calls import MOST_CALLS
from veneer.serve.api.echo import Echo, check_length, with_prompts
from veneer.serve.api.errors import ERROR_RESPONSES, failed
from veneer.serve.api.metrics import Metrics
from veneer.serve.api.protocol import (
    AnswerRequest,
    ChatRequest,
    CompletionRequest,
)
from veneer.serve.api.replies import ChatReply, CompletionReply, Reply, usage_of
from veneer.serve.engine.request import Answer, Request
from veneer.serve.engine.served import Served
from veneer.serve.engine.stream import Stream, cancel, pieces_of

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens for completions


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the routes below /v1 that clients of OpenAI call."""
    router = APIRouter(prefix="/v1", responses=ERROR_RESPONSES)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(all_models)}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        served.adapter(model)
        return await asyncio.to_thread(model_of, model)

    @router.post("/chat/completions", responses=STREAMED)
    async def chat(asked: ChatRequest, http: HttpRequest) -> Response:
        if asked.top_logprobs and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs.", param="top_logprobs")
        adapter = served.which(asked.model, asked.adapters)
        tools = await asyncio.to_thread(Tools.of, asked, served.tokenizer)
        text_of = await asyncio.to_thread(served.text_of, adapter)

        def prepare() -> list[Request]:
            turns = [message.turn for message in asked.messages]
            for_template = [tool.for_template for tool in tools.all]
            tokens = served.chat_tokens(turns, for_template, which=adapter)
            most = asked.max_completion_tokens or asked.max_tokens
            new = served.new_tokens(tokens, most, None, which=adapter)
            return asked.requests(
                tokens,
                adapter,
                new_tokens=new,
                logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
                grammar=tools.grammar,
                special=tools.special,
            )

        reply = ChatReply(
            asked.model,
            text_of,
            logprobs=bool(asked.logprobs),
            readers=tools.reader if tools.all else None,
            most_calls=1 if asked.parallel_tool_calls is False else MOST_CALLS,
        )
        return await respond(asked, prepare, reply, http)

    @router.post("/completions", responses=STREAMED)
    async def completions(asked: CompletionRequest, http: HttpRequest) -> Response:
        asked.check()
        adapter = served.which(asked.model, asked.adapters)
        echoes: list[Echo] = []

        def prepare() -> list[Request]:
            requests: list[Request] = []
            for prompt in asked.prompts:
                tokens = served.prompt_tokens(prompt, which=adapter)
                if asked.echo:
                    echoes.append(Echo.of(served, prompt, adapter))
                if asked.max_tokens != 0:
                    new = served.new_tokens(
                        tokens, asked.max_tokens, COMPLETION_TOKENS, which=adapter
                    )
                    requests += asked.requests(
                        tokens, adapter, new_tokens=new, logprobs=asked.logprobs
                    )
            if asked.scores_prompts:
                check_length(echoes)
                requests += [echo.scoring(adapter, asked.logprobs or 0) for echo in echoes]
            return requests

        text_of = await asyncio.to_thread(served.text_of, adapter)
        reply = CompletionReply(
            asked.model,
            text_of,
            logprobs=asked.logprobs is not None,
            as_ids=bool(asked.return_tokens_as_token_ids),
        )
        return await respond(asked, prepare, reply, http, partial(with_prompts, asked, echoes))

    def all_models() -> list[dict[str, Any]]:
        shown = []
        for name in (served.name, *served.library.names()):
            with suppress(AdapterError, RequestError):  # one that was unloaded meanwhile
                shown.append(model_of(name))
        return shown

    def model_of(name: str) -> dict[str, Any]:
        is_base = name == served.name
        return {
            "id": name,
            "object": "model",
            "created": int(served.started),
            "owned_by": "veneer",
            "root": served.root if is_base else str(served.library.info(name).directory),
            "parent": None if is_base else served.name,
            "max_model_len": served.context_of(None if is_base else name),
        }

    async def respond(
        asked: AnswerRequest,
        prepare: Callable[[], list[Request]],
        reply: Reply,
        http: HttpRequest,
        shown: Callable[[list[Answer]], list[Answer]] = list,
    ) -> Response:
        # On another thread, for templates and tokenizers take their time.
        streams = await asyncio.to_thread(lambda: served.submit(prepare()))
        pieces, n = metrics.watch(pieces_of(streams)), asked.n or 1
        request_id = http.state.request_id
        if asked.stream:
            usage_of_n = n if asked.usage_in_stream else None
            return Streaming(events(pieces, len(streams), reply, usage_of_n, request_id), streams)
        answers = await unless_disconnected(collected(pieces, len(streams)), http)
        if answers is None:
            return Response(status_code=499)  # nobody reads it
        for answer in answers:
            if answer.error is not None:
                raise failed(answer.error, request_id)

        def whole() -> Response:
            choices = shown(answers)
            return JSONResponse(reply.whole(choices, usage_of(choices, n)))

        # On another thread too, for log probabilities of long prompts are megabytes.
        return await asyncio.to_thread(whole)

    return router


class Streaming(StreamingResponse):
    """Server-sent events. When the response ends, or never begins, its answers are cancelled."""

    def __init__(self, events: AsyncIterator[str], streams: Sequence[Stream]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.streams)


async def collected(pieces: AsyncIterator[tuple[int, Answer]], count: int) -> list[Answer]:
    """Return whole answers, `count` of them."""
    by_answer: list[list[Answer]] = [[] for _ in range(count)]
    async for number, piece in pieces:
        by_answer[number].append(piece)
    return [Answer.joined(own) for own in by_answer]


async def unless_disconnected(work: Any, http: HttpRequest) -> Any:
    """Return what `work` returns; or None, ending it, as soon as the client disconnects."""
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        disconnected.cancel()
        working.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def events(
    pieces: AsyncGenerator[tuple[int, Answer], None],
    count: int,
    reply: Reply,
    n: int | None,
    request_id: str,
) -> AsyncIterator[str]:
    """Yield `count` answers as server-sent events, as they are made.

    n: how many of them belong to each prompt, for a last event with the usage; None for no usage.
    """
    more: dict[str, Any] = {} if n is None else {"usage": None}
    lengths = [0] * count  # characters sent of each answer
    ends: dict[int, Answer] = {}
    try:
        for number in range(count):
            if opening := reply.opening(number):
                yield _event(reply.chunk(opening, **more))
        async for number, piece in pieces:
            # A connection that was lost with the last event is seen now; the system's errors of
            # many more would fill the log.
            await asyncio.sleep(0)
            if piece.text or piece.tokens:
                delta = reply.delta(number, piece, lengths[number])
                lengths[number] += len(piece.text)
                if delta is not None:
                    yield _event(reply.chunk(delta, **more))
            if piece.reason is None:
                continue
            ends[number] = piece
            if piece.error is not None:
                yield _event(failed(piece.error, request_id).body())
            else:
                yield _event(reply.chunk(reply.ending(number, piece), **more))
        if n is not None:
            usage = usage_of([ends[number] for number in range(count)], n)
            yield _event(reply.chunk(usage=usage))
    except Exception as error:  # the status is sent already
        yield _event(failed(error, request_id).body())
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
