"""vLLM's routes for loading and unloading adapters while the server runs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from veneer.errors import AdapterError, RequestError
from veneer.formats.locate import locate
from veneer.formats.training import other_base
from veneer.serve.api.errors import ERROR_RESPONSES, ApiError
from veneer.serve.api.protocol import LoadRequest, UnloadRequest
from veneer.serve.config import ADAPTER_NAME
from veneer.serve.engine.served import Served

log = logging.getLogger("veneer.serve")
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}  # as vLLM answers


def routes(served: Served, root: Path | None) -> APIRouter:
    """Return the routes for adapters below `root`; where that is None, they answer 404."""
    router = APIRouter(prefix="/v1", responses=ERROR_RESPONSES)
    changing = asyncio.Lock()

    @router.post("/load_lora_adapter", responses=TEXT)
    async def load(asked: LoadRequest) -> Response:
        directory = _enabled(root)
        _check_name(asked.lora_name, served)
        async with changing:
            await asyncio.to_thread(_load, served, asked, directory)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", responses=TEXT)
    async def unload(asked: UnloadRequest) -> Response:
        _enabled(root)
        name = asked.lora_name
        _check_name(name, served)
        async with changing:
            if served.library.find(name) is None:
                message = f"The LoRA adapter '{name}' cannot be found."
                raise ApiError(404, message, param="lora_name")
            served.library.remove(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def find(root: Path, lora_path: str) -> Path:
    """Return the adapter that a request names, which must lie below `root`: `locate` finds it.

    Links are resolved first, also those of the files in it. What lies elsewhere is refused in the
    same words whether it exists or not.
    Raises RequestError.
    """
    root = root.resolve()
    try:
        path = (root / lora_path).resolve()
        # Elsewhere not even its existence is looked up.
        inside = path != root and _is_inside(root, path)
        if inside:
            path = locate(path).path.resolve()
            inside = _is_inside(root, path)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
        if isinstance(error, AdapterError):
            raise RequestError(str(error), param="lora_path") from error
        inside = False
    if not inside:
        message = "lora_path must name a directory or a .gguf file below --adapters-dir."
        raise RequestError(message, param="lora_path")
    return path


def _is_inside(root: Path, path: Path) -> bool:
    """Return whether a path, and all that is below it, lie below `root`."""
    if not path.is_relative_to(root):
        return False
    files = path.rglob("*") if path.is_dir() else [path] if path.is_file() else []
    return bool(files) and all(file.resolve().is_relative_to(root) for file in files)


def _load(served: Served, asked: LoadRequest, root: Path) -> None:
    name = asked.lora_name
    before = served.library.find(name)
    if before is not None and not before.refusal and not asked.load_inplace:
        raise RequestError(
            f"The LoRA adapter '{name}' has already been loaded. To replace it, set "
            "'load_inplace' to true.",
            param="lora_name",
        )
    directory = find(root, asked.lora_path)
    served.library.add(name, directory)
    try:
        served.engine.load(name)  # now, so that one that does not fit is refused here
    except BaseException:
        if before is None:
            served.library.remove(name)
        else:
            served.library.add(name, before.directory, refusal=before.refusal)
        raise
    if text := other_base(f"The adapter {name!r}", locate(directory).training, served.computed_in):
        log.warning(text)


def _enabled(root: Path | None) -> Path:
    if root is None:
        raise ApiError(
            404, "Loading adapters is off; it is enabled by veneer serve --enable-lora-loading."
        )
    return root


def _check_name(name: str, served: Served) -> None:
    if not ADAPTER_NAME.fullmatch(name) or name == served.name:
        raise RequestError(
            "lora_name must begin with a letter or digit, have at most 64 letters, digits, dots, "
            "dashes and underscores, and not be the base's.",
            param="lora_name",
        )
