"""OpenAI's routes for fine-tuning jobs."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest

from veneer.errors import RequestError
from veneer.run_directory import STATE
from veneer.serve.api.errors import ERROR_RESPONSES
from veneer.serve.api.files import enabled
from veneer.serve.api.job_protocol import JobRequest
from veneer.serve.api.paging import listed, page
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.settings import GROUPS, HYPERPARAMETERS, method_of
from veneer.serve.jobs.values import Job, JobEvent

PREFIX = "/v1/fine_tuning/jobs"
Limit = Annotated[int, Query(ge=1, le=1000)]
_METADATA = re.compile(r"metadata\[(.{0,64})\]")
_EVENT = re.compile(r"ftevent-(\d{1,18})")


def routes(jobs: Jobs | None) -> APIRouter:
    """Return the routes below /v1/fine_tuning/jobs; where training is off, they answer 404."""
    router = APIRouter(prefix=PREFIX, responses=ERROR_RESPONSES)

    @router.post("")
    async def create(asked: JobRequest) -> dict[str, Any]:  # type: ignore[valid-type]
        """Take a job into the queue."""
        service = enabled(jobs)
        return shown(await asyncio.to_thread(service.create, asked.order()))  # type: ignore[attr-defined]

    @router.get("")
    async def all_jobs(
        http: HttpRequest, after: str | None = None, limit: Limit = 20
    ) -> dict[str, Any]:
        """List jobs, the newest first; metadata[key]=value: only those that have it."""
        required = {
            match[1]: value
            for name, value in http.query_params.items()
            if (match := _METADATA.fullmatch(name))
        }
        known = await asyncio.to_thread(enabled(jobs).store.jobs)
        chosen = [
            shown(job)
            for job in reversed(known)
            if required.items() <= (job.metadata or {}).items()
        ]
        return page(chosen, after, limit)

    @router.get("/{fine_tuning_job_id}")
    async def job(fine_tuning_job_id: str) -> dict[str, Any]:
        """Show a job."""
        return shown(await asyncio.to_thread(enabled(jobs).job, fine_tuning_job_id))

    @router.post("/{fine_tuning_job_id}/cancel")
    async def cancel(fine_tuning_job_id: str) -> dict[str, Any]:
        """End a job for good; its checkpoints stay."""
        return shown(await asyncio.to_thread(enabled(jobs).cancel, fine_tuning_job_id))

    @router.post("/{fine_tuning_job_id}/pause")
    async def pause(fine_tuning_job_id: str) -> dict[str, Any]:
        """Let a job stop after its step, with a checkpoint."""
        return shown(await asyncio.to_thread(enabled(jobs).pause, fine_tuning_job_id))

    @router.post("/{fine_tuning_job_id}/resume")
    async def resume(fine_tuning_job_id: str) -> dict[str, Any]:
        """Let a job go on that was paused, or that failed."""
        return shown(await asyncio.to_thread(enabled(jobs).resume, fine_tuning_job_id))

    @router.get("/{fine_tuning_job_id}/events")
    async def events(
        fine_tuning_job_id: str, after: str | None = None, limit: Limit = 20
    ) -> dict[str, Any]:
        """List what happened to a job, the newest first."""
        service = enabled(jobs)
        match = _EVENT.fullmatch(after or "")
        if after and match is None:
            raise RequestError("after must be the id of an event.", param="after")
        before = int(match[1]) if match else None

        def look() -> list[JobEvent]:
            job = service.job(fine_tuning_job_id)
            return service.store.events(job.id, limit=limit + 1, before=before)

        known = await asyncio.to_thread(look)
        return listed([shown_event(x) for x in known[:limit]], has_more=len(known) > limit)

    @router.get("/{fine_tuning_job_id}/checkpoints")
    async def checkpoints(
        fine_tuning_job_id: str, after: str | None = None, limit: Limit = 10
    ) -> dict[str, Any]:
        """List a job's checkpoints that are served, the newest first."""
        service = enabled(jobs)
        known = await asyncio.to_thread(
            lambda: shown_checkpoints(service, service.job(fine_tuning_job_id))
        )
        return page(known, after, limit)

    return router


def shown(job: Job) -> dict[str, Any]:
    """Return a job as OpenAI has it; `step`, `steps` and `settings` are ours."""
    left = None
    if job.status == "running" and job.step > job.since and job.steps:
        each = job.seconds / (job.step - job.since)
        left = int(time.time() + each * (job.steps - job.step))
    fault = job.fault
    own = {k: v for group in GROUPS for k, v in job.settings.get(group, {}).items()}
    method, grader = method_of(job.settings), job.settings.get("grader")
    of_method = {"hyperparameters": dict(job.hyperparameters)} | (
        {"grader": grader} if grader else {}
    )
    own.pop("eval_data", None)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": job.created,
        "finished_at": job.finished,
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "organization_id": "veneer",
        "result_files": list(job.result_files),
        "status": job.status,
        "validation_file": job.validation_file,
        "training_file": job.training_file,
        "hyperparameters": {name: job.hyperparameters[name] for name in HYPERPARAMETERS},
        "method": {"type": method, method: of_method},
        "trained_tokens": job.tokens if job.has_ended else None,
        "error": fault and {"code": fault.code, "message": fault.message, "param": fault.param},
        "integrations": [],
        "seed": job.seed,
        "estimated_finish": left,
        "metadata": job.metadata,
        "user_provided_suffix": job.suffix,
        "step": job.step,
        "steps": job.steps,
        "run": job.name,
        "settings": own,
    }


def shown_event(event: JobEvent) -> dict[str, Any]:
    """Return an event as OpenAI has it."""
    data = event.data or {}
    is_metrics = not data.keys().isdisjoint(("train_loss", "valid_loss", "valid_reward"))
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": "metrics" if is_metrics else "message",
        "data": dict(data),
    }


def shown_checkpoints(service: Jobs, job: Job) -> list[dict[str, Any]]:
    """Return the checkpoints of a job as OpenAI has them, the newest first."""
    losses: dict[int, dict[str, float]] = {}
    for line in service.losses(job):
        of_step = losses.setdefault(int(line["step"]), {"step": line["step"]})
        if "loss" in line:
            of_step["train_loss"] = line["loss"]
        if "eval_reward" in line:
            of_step["valid_reward"] = line["eval_reward"]
        elif "eval_loss" in line:
            of_step["full_valid_loss"] = of_step["valid_loss"] = line["eval_loss"]
    checkpoints = []
    for name, place in reversed(service.publisher.checkpoints(job).items()):
        if service.served.library.find(name) is None:
            continue  # it has just been written, and is about to be served
        step = int(place.name.rpartition("-")[2])
        checkpoints.append(
            {
                "id": f"ftckpt-{job.id.removeprefix('ftjob-')}-{step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": _time_of(place / STATE),
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job.id,
                "metrics": losses.get(step, {"step": step}),
                "step_number": step,
            }
        )
    return checkpoints


def _time_of(path: Path) -> int:
    with suppress(OSError):  # it may have just been replaced by a newer one
        return int(path.stat().st_mtime)
    return int(time.time())
