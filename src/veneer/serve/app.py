"""The application: all routes, and the checks before them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import ASGIApp

from veneer.serve.api import embeddings, errors, files, fine_tuning, graders, loading, openai
from veneer.serve.api.audit import AuditLog
from veneer.serve.api.errors import ERROR_RESPONSES, ApiError
from veneer.serve.api.guard import Guard
from veneer.serve.api.metrics import CountResponses, Metrics
from veneer.serve.config import Keys, Limits
from veneer.serve.engine.served import Served
from veneer.serve.jobs.service import Jobs
from veneer.serve.page import panel
from veneer.serve.page.runs import Runs


def create_app(
    served: Served,
    *,
    keys: Keys | Callable[[], Keys] | None = None,
    limits: Limits | None = None,
    runs: Path | None = None,
    loading_root: Path | None = None,
    jobs: Jobs | None = None,
    is_draining: Callable[[], bool] = lambda: False,
    audit: AuditLog | None = None,
) -> ASGIApp:
    """Return the application that serves `served`.

    runs: the directory whose training runs are shown. loading_root: the directory below which
    adapters may be loaded, or None where that is off. jobs: the trainings beside serving, or None
    where there are none. is_draining: whether the server is ending. audit: where requests that need
    the admin key are written down.
    """
    # FastAPI's own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Veneer", version=version("veneer"), docs_url=None, redoc_url=None)
    metrics = Metrics(lambda: _numbers(served))
    errors.install(app)
    app.include_router(openai.routes(served, metrics))
    app.include_router(embeddings.routes(served, metrics))
    app.include_router(loading.routes(served, loading_root))
    app.include_router(files.routes(jobs))
    app.include_router(fine_tuning.routes(jobs))
    app.include_router(graders.routes(jobs))
    app.include_router(panel.routes(served, Runs(runs) if runs is not None else None, jobs))
    panel.add_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer, which shows that the server lives."""
        return {"status": "ok"}

    @app.get("/ready", responses=ERROR_RESPONSES)
    async def ready() -> dict[str, str]:
        """Answer 200 while the server takes requests, and 503 once it is ending."""
        if is_draining():
            raise ApiError(503, "The server is about to end.", code="draining")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Return the server's metrics in Prometheus' text format."""
        text = await asyncio.to_thread(metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # Outside of the framework, so that a refused request costs least.
    fixed = Keys() if keys is None else keys
    guard = Guard(
        app,
        keys=fixed if callable(fixed) else lambda: fixed,
        limits=limits or Limits(),
        is_draining=is_draining,
        audit=audit,
    )
    return CountResponses(guard, metrics=metrics)


def _numbers(served: Served) -> Mapping[str, float]:
    """Return the engine's numbers; of those that are lists, their length."""
    stats = asdict(served.engine.stats).items()
    numbers = {name: len(v) if isinstance(v, tuple) else v for name, v in stats}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
