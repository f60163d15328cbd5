"""The application: routes, what stands before them, and what every response has."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import ASGIApp

from veneer.serve.api import errors as faults
from veneer.serve.api import loading, openai
from veneer.serve.api.errors import Fault
from veneer.serve.api.guard import Guard
from veneer.serve.api.metrics import CountResponses, Counts
from veneer.serve.config import Keys, Limits
from veneer.serve.engine.served import Served
from veneer.serve.page import panel
from veneer.serve.page.runs import Runs


def create_app(
    served: Served,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    runs: Path | None = None,
    loading_root: Path | None = None,
    is_draining: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """Return the application that serves `served`.

    runs: the directory whose training runs are shown. loading_root: the directory below which
    adapters may be loaded, or None where that is off. is_draining: whether the server is to end.
    """
    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Veneer", version=version("veneer"), docs_url=None, redoc_url=None)
    counts = Counts(lambda: _numbers(served))
    faults.install(app)
    app.include_router(openai.routes(served, counts))
    app.include_router(loading.routes(served, loading_root))
    app.include_router(panel.routes(served, Runs(runs) if runs is not None else None))
    panel.add_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the server answers."""
        return {"status": "ok"}

    @app.get("/ready", responses=openai.REFUSALS)
    async def ready() -> dict[str, str]:
        """Tell that the server takes requests; 503 once it is about to end."""
        if is_draining():
            raise Fault(503, "The server is about to end.", code="draining")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Tell the server's numbers, in Prometheus' text format."""
        text = await asyncio.to_thread(counts.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # Outside of the framework, so that what is refused costs least.
    guard = Guard(app, keys=keys or Keys(), limits=limits or Limits(), is_draining=is_draining)
    return CountResponses(guard, counts=counts)


def _numbers(served: Served) -> Mapping[str, float]:
    """Return the engine's numbers, those that are lists by their length."""
    told: dict[str, Any] = asdict(served.engine.stats)
    plain = {n: len(v) if isinstance(v, tuple) else v for n, v in told.items()}
    return {n: v for n, v in plain.items() if math.isfinite(v)}
