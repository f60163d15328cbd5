"""The page at /, and the routes that it asks beside OpenAI's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query
from fastapi.responses import FileResponse, StreamingResponse
from starlette.staticfiles import StaticFiles

from veneer.errors import Missing, RequestError
from veneer.serve.api.errors import ERROR_RESPONSES
from veneer.serve.api.files import enabled
from veneer.serve.api.job_protocol import MergeRequest, PlanRequest, RowsRequest
from veneer.serve.api.protocol import TokensRequest
from veneer.serve.engine.served import Served
from veneer.serve.jobs.service import Jobs
from veneer.serve.page.about import about, with_invocation
from veneer.serve.page.changed import changed
from veneer.serve.page.download import Format, zipped, zipped_model
from veneer.serve.page.drawn import last_samples
from veneer.serve.page.merged import shown
from veneer.serve.page.planned import Asked, planned
from veneer.serve.page.rows import first_rows
from veneer.serve.page.runs import Runs

ZIP: dict[int | str, dict[str, Any]] = {200: {"content": {"application/zip": {}}}}
STATIC = Path(__file__).parent / "static"


def add_page(app: FastAPI) -> None:
    """Let `app` send the page's files, which load nothing from elsewhere."""
    fresh = {"cache-control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=fresh)

    app.mount("/page", StaticFiles(directory=STATIC), name="page")


def routes(served: Served, runs: Runs | None, jobs: Jobs | None) -> APIRouter:
    """Return the routes below /api. jobs: None where training is off."""
    router = APIRouter(prefix="/api", responses=ERROR_RESPONSES)

    @router.get("/adapters")
    async def adapters() -> dict[str, Any]:
        """Return the base, and for each adapter what its files say."""

        def look() -> list[dict[str, Any]]:
            shown = []
            for entry in served.library.entries():
                own = about(entry.directory, entry.version, served.computed_in)
                refusal = {"error": entry.refusal} if entry.refusal else {}
                in_words = with_invocation(own, served.tokenizer)
                shown.append({"name": entry.name, **in_words, **refusal})
            return shown

        in_memory = set(served.engine.stats.resident)
        described = await asyncio.to_thread(look)
        return {
            "base": {"name": served.name, "root": served.root, "context": served.context},
            "adapters": [{**each, "resident": each["name"] in in_memory} for each in described],
            "training": jobs is not None,
        }

    @router.get("/adapters/{name}/layers")
    async def layers(name: str) -> dict[str, Any]:
        """Return how much an adapter changes each layer."""
        adapter = served.adapter(name)
        if adapter is None:
            raise RequestError(f"{name} is the base, which changes nothing.", param="name")
        entry = served.library.info(adapter)
        return await asyncio.to_thread(changed, entry.directory, entry.version, served.weights)

    @router.get("/runs")
    async def show_runs() -> dict[str, Any]:
        """Return the runs below --runs; `enabled` is false where none are shown."""
        shown = await asyncio.to_thread(runs.shown) if runs is not None else []
        return {"enabled": runs is not None, "runs": shown}

    @router.get("/runs/differences")
    async def differences(
        run: Annotated[list[str], Query(min_length=2, max_length=2)],
    ) -> dict[str, Any]:
        """Return the settings in which two runs differ."""
        if runs is None:
            raise Missing("No runs are shown: start with --runs DIRECTORY.", param="run")
        return {"runs": run, "differences": await asyncio.to_thread(runs.differences, run)}

    @router.post("/rows")
    async def show_rows(asked: RowsRequest) -> dict[str, Any]:
        """Return the first rows of a file as the model reads them, and which pieces it learns."""
        service = enabled(jobs)
        served.adapter(asked.model)
        return await asyncio.to_thread(first_rows, service, served, asked.file)

    @router.post("/plan")
    async def plan(asked: PlanRequest) -> dict[str, Any]:
        """Return what the planner says of an adapter over the base, before it is trained."""
        base = enabled(jobs).base
        adapter = Asked(**asked.model_dump())

        def look() -> dict[str, Any]:
            return planned(base, adapter, runs.speed(base.name) if runs is not None else None)

        return await asyncio.to_thread(look)

    @router.get("/jobs/{job_id}/adapter", response_class=StreamingResponse, responses=ZIP)
    async def adapter(job_id: str, format: Format = "native") -> StreamingResponse:
        """Return the adapter that a job has trained, as a zip file."""
        content = await asyncio.to_thread(zipped, enabled(jobs), job_id, format)
        return StreamingResponse(content, media_type="application/zip")

    @router.get("/jobs/{job_id}/samples")
    async def samples(job_id: str) -> dict[str, Any]:
        """Return the answers of a job's last step on samples, each with its reward."""
        return await asyncio.to_thread(last_samples, enabled(jobs), job_id)

    @router.get("/merges")
    async def merge_of(model: str) -> dict[str, Any]:
        """Return what is merged of an adapter, or is being merged."""
        service = enabled(jobs)
        return shown(model, await asyncio.to_thread(service.merged, model), service.places.root)

    @router.post("/merges")
    async def merge(asked: MergeRequest) -> dict[str, Any]:
        """Begin to merge an adapter into the base, in a process of its own."""
        service = enabled(jobs)
        begun = await asyncio.to_thread(service.merge, asked.model)
        return shown(asked.model, begun, service.places.root)

    @router.get("/merges/model", response_class=StreamingResponse, responses=ZIP)
    async def merged_model(model: str) -> StreamingResponse:
        """Return a merged model, as a zip file."""
        content = await asyncio.to_thread(zipped_model, enabled(jobs), model)
        return StreamingResponse(content, media_type="application/zip")

    @router.post("/tokens")
    async def tokens(asked: TokensRequest) -> dict[str, Any]:
        """Return how likely each token of an answer is, with the adapter and without."""
        adapter = served.which(asked.model, None)
        if not adapter:
            raise RequestError("This needs an adapter, to compare with the base.", param="model")

        def look() -> list[dict[str, Any]]:
            turns = [message.turn for message in asked.messages]
            return [
                {"text": text, "base": base, "adapter": ours}
                for text, base, ours in served.compared(turns, asked.answer, adapter)
            ]

        return {"model": asked.model, "tokens": await asyncio.to_thread(look)}

    return router
