"""The page at /, and what it asks for beside OpenAI's routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from veneer.serve.api.errors import Fault
from veneer.serve.api.openai import REFUSALS
from veneer.serve.api.protocol import TokensRequest
from veneer.serve.engine.served import Served
from veneer.serve.page.about import about
from veneer.serve.page.runs import Runs

PAGE = Path(__file__).parent / "static"


def add_page(app: FastAPI) -> None:
    """Let `app` give out the page: three files, which ask for no other."""
    fresh = {"cache-control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=fresh)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def routes(served: Served, runs: Runs | None) -> APIRouter:
    """Return the routes below /api."""
    router = APIRouter(prefix="/api", responses=REFUSALS)

    @router.get("/adapters")
    async def adapters() -> dict[str, Any]:
        """Tell the base, and of each adapter what is known."""

        def look() -> list[dict[str, Any]]:
            entries = [served.library.info(name) for name in served.library.names()]
            return [{"name": e.name, **about(e.directory, e.version)} for e in entries]

        resident = set(served.engine.stats.resident)
        found = await asyncio.to_thread(look)
        return {
            "base": {"name": served.name, "root": served.root, "context": served.context},
            "adapters": [{**each, "resident": each["name"] in resident} for each in found],
        }

    @router.get("/runs")
    async def show_runs() -> dict[str, Any]:
        """Tell how the runs below --runs stand; `enabled` is false where none are shown."""
        found = await asyncio.to_thread(runs.shown) if runs is not None else []
        return {"enabled": runs is not None, "runs": found}

    @router.post("/tokens")
    async def tokens(asked: TokensRequest) -> dict[str, Any]:
        """Tell of each token of an answer how likely it is, with the adapter and without."""
        adapter = served.known(asked.model)
        if adapter is None:
            raise Fault(400, "This needs an adapter, to hold against the base.", param="model")

        def look() -> list[dict[str, Any]]:
            prompt = served.chat_tokens(asked.messages)
            encoded = served.spans(asked.answer)
            answer = [token for token, _ in encoded]
            whole = [*prompt, *answer]
            served.check_context(whole)
            with_it, without = (
                list(served.engine.score(whole, which))[-len(answer) :] for which in (adapter, None)
            )
            return [
                {"text": text, "base": base, "adapter": ours}
                for (_, text), base, ours in zip(encoded, without, with_it, strict=True)
            ]

        return {"model": asked.model, "tokens": await asyncio.to_thread(look)}

    return router
