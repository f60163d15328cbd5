"""OpenAI's /v1/embeddings: vectors of texts, by the base or with adapters."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from veneer.errors import RequestError
from veneer.serve.api.errors import ERROR_RESPONSES, failed
from veneer.serve.api.metrics import Metrics
from veneer.serve.api.openai import collected, unless_disconnected
from veneer.serve.api.protocol import Mix, TokenId
from veneer.serve.api.strict import Strict, Text
from veneer.serve.engine.request import Answer, Request
from veneer.serve.engine.served import Served
from veneer.serve.engine.stream import pieces_of

MOST_TEXTS = 2048  # of one request, as OpenAI


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. `pooling` and `adapters` are Veneer's own."""

    ignored: ClassVar = {"user": "it names the caller"}

    model: Annotated[str, Field(max_length=512)]
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_TEXTS),
        ]
    )
    adapters: Mix | None = None
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """Return each text, or its tokens."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the route that embeds texts."""
    router = APIRouter(prefix="/v1", responses=ERROR_RESPONSES)

    @router.post("/embeddings")
    async def embeddings(asked: EmbeddingRequest, http: HttpRequest) -> Response:
        adapter = served.which(asked.model, asked.adapters)
        pooling = asked.pooling or "mean"

        def request_of(text: str | list[int]) -> Request:
            tokens = served.prompt_tokens(text, param="input", which=adapter)
            return Request(tuple(tokens), adapter, embedding=pooling)

        def all_requests() -> list[Request]:
            return [request_of(each) for each in asked.texts]

        async def all_of() -> list[Answer]:
            # All are looked at first. Each is computed alone, so one after another waits no longer.
            requests = await asyncio.to_thread(all_requests)
            answers: list[Answer] = []
            for request in requests:
                streams = await asyncio.to_thread(served.submit, [request])
                answers += await collected(metrics.watch(pieces_of(streams)), 1)
                if (error := answers[-1].error) is not None:
                    raise failed(error, http.state.request_id)
            return answers

        answers = await unless_disconnected(all_of(), http)
        if answers is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(_reply(asked, answers))

    return router


def _reply(asked: EmbeddingRequest, answers: Sequence[Answer]) -> dict[str, Any]:
    width = len(answers[0].embedding)
    if asked.dimensions not in (None, width):
        raise RequestError(
            f"dimensions is {asked.dimensions}, but this model's embeddings have {width}.",
            param="dimensions",
        )
    written = _as_base64 if asked.encoding_format == "base64" else list
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(answer.embedding)}
            for index, answer in enumerate(answers)
        ],
        "model": asked.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _as_base64(vector: Sequence[float]) -> str:
    """Return a vector as OpenAI's client asks for it: float32, the lowest byte first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
