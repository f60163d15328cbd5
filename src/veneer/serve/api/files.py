"""OpenAI's routes for files: rows to learn, and the losses of jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, Response
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from veneer.errors import RequestError
from veneer.serve.api.errors import ERROR_RESPONSES, ApiError
from veneer.serve.api.paging import page
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.values import StoredFile

UPLOAD = "/v1/files"  # takes forms, which may be larger than other bodies
PURPOSE = "fine-tune"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
    },
}
FORM: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
}
CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
OFF = "Training is off; it is enabled by veneer serve --enable-training --runs DIR."


def routes(jobs: Jobs | None) -> APIRouter:
    """Return the routes below /v1/files; where training is off, they answer 404."""
    router = APIRouter(prefix=UPLOAD, responses=ERROR_RESPONSES)

    @router.post("", openapi_extra=FORM, response_model=dict[str, Any])
    async def upload(http: HttpRequest) -> Any:
        """Check a file of rows, and keep it."""
        kept = enabled(jobs)
        try:
            await http.form(max_files=1, max_fields=8)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        async with http.form() as form:
            fields = dict[str, Any](form.multi_items())
            file = fields.pop("file", None)
            purpose = fields.pop("purpose", None)
            if not isinstance(file, UploadFile):
                raise RequestError("The form needs a file, under the name file.", param="file")
            if purpose != PURPOSE:
                raise RequestError(f"The purpose must be {PURPOSE}.", param="purpose")
            if fields:
                raise RequestError(f"{min(fields)[:80]} is not supported.", param=min(fields)[:80])
            source, name = file.file, file.filename or ""
            return shown(await asyncio.to_thread(kept.upload, name, source, file.size or 0))

    @router.get("")
    async def files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        """List files, the newest first."""
        known = await asyncio.to_thread(enabled(jobs).files)
        chosen = [shown(file) for file in known if purpose in (None, file.purpose)]
        return page(chosen if order == "asc" else chosen[::-1], after, limit)

    @router.get("/{file_id}")
    async def file(file_id: str) -> dict[str, Any]:
        """Show a file."""
        return shown(await asyncio.to_thread(enabled(jobs).file, file_id))

    @router.get("/{file_id}/content", response_class=FileResponse, responses=CONTENT)
    async def content(file_id: str) -> FileResponse:
        """Return what a file holds, as it came."""
        kept = enabled(jobs)
        stored = await asyncio.to_thread(kept.file, file_id)
        path = kept.places.file(stored)
        return FileResponse(path, media_type="application/octet-stream", filename=stored.name)

    @router.delete("/{file_id}")
    async def delete(file_id: str) -> dict[str, Any]:
        """Delete a file that no job needs."""
        await asyncio.to_thread(enabled(jobs).remove_file, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def shown(file: StoredFile) -> dict[str, Any]:
    """Return a file as OpenAI has it; `rows` and `kind` are ours."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "rows": file.rows,
        "kind": file.kind,
    }


def enabled(jobs: Jobs | None) -> Jobs:
    """Return the jobs. Raises ApiError where training is off."""
    if jobs is None:
        raise ApiError(404, OFF)
    return jobs
