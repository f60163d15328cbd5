"""vLLM's routes for loading and unloading adapters while the server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from veneer.serve.api.errors import Fault
from veneer.serve.api.openai import REFUSALS
from veneer.serve.api.protocol import LoadRequest, UnloadRequest
from veneer.serve.config import ADAPTER_NAME
from veneer.serve.engine.served import Served

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}  # as vLLM answers


def routes(served: Served, root: Path | None) -> APIRouter:
    """Return the routes; without a `root`, below which adapters must lie, they only say so."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)
    changing = asyncio.Lock()

    @router.post("/load_lora_adapter", responses=TEXT)
    async def load(asked: LoadRequest) -> Response:
        place = _enabled(root)
        _check_name(asked.lora_name, served)
        async with changing:
            await asyncio.to_thread(_load, served, asked, place)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", responses=TEXT)
    async def unload(asked: UnloadRequest) -> Response:
        _enabled(root)
        _check_name(asked.lora_name, served)
        async with changing:
            if asked.lora_name not in served.library.names():
                raise _not_there(asked.lora_name)
            served.library.remove(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


def find(root: Path, given: str) -> Path:
    """Return the adapter's directory that `given` names, which must lie below `root`.

    Links are followed before the question is asked, those of its files too. What lies elsewhere
    is refused in the same words whether it exists or not.
    Raises Fault.
    """
    root = root.resolve()
    try:
        place = (root / given).resolve()
        # Not even its existence is looked up elsewhere.
        inside = place != root and place.is_relative_to(root) and place.is_dir()
        inside = inside and all(file.resolve().is_relative_to(root) for file in place.iterdir())
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a loop of links
        inside = False
    if not inside:
        raise Fault(400, "lora_path must name a directory below --adapters-dir.", param="lora_path")
    return place


def _load(served: Served, asked: LoadRequest, root: Path) -> None:
    name = asked.lora_name
    before = served.library.info(name) if name in served.library.names() else None
    if before is not None and not asked.load_inplace:
        raise Fault(
            400,
            f"The LoRA adapter '{name}' has already been loaded. To put another in its place, set "
            "'load_inplace' to true.",
            param="lora_name",
        )
    served.library.add(name, find(root, asked.lora_path))
    try:
        served.engine.load(name)  # now, so that one that does not fit is refused here
    except BaseException:
        if before is None:
            served.library.remove(name)
        else:
            served.library.add(name, before.directory)
        raise


def _enabled(root: Path | None) -> Path:
    if root is None:
        raise Fault(
            404, "Loading adapters is off; it is enabled by veneer serve --enable-lora-loading."
        )
    return root


def _check_name(name: str, served: Served) -> None:
    if not ADAPTER_NAME.fullmatch(name) or name == served.name:
        raise Fault(
            400,
            "lora_name must begin with a letter or digit, have at most 64 letters, digits, dots, "
            "dashes and underscores, and not be the base's.",
            param="lora_name",
        )


def _not_there(name: str) -> Fault:
    return Fault(404, f"The LoRA adapter '{name}' cannot be found.", param="lora_name")
