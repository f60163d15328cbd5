"""OpenAI's routes that try a grader out, before a job learns by it."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from veneer.rewards.graders import Grader, Multi, grade, grader_of, grades
from veneer.rewards.judged import RewardFault
from veneer.serve.api.errors import ERROR_RESPONSES
from veneer.serve.api.files import enabled
from veneer.serve.api.strict import Strict, Text
from veneer.serve.jobs.service import Jobs

PREFIX = "/v1/fine_tuning/alpha/graders"
ERRORS = (
    *("formula_parse_error", "invalid_variable_error", "other_error", "sample_parse_error"),
    *("truncated_observation_error", "unresponsive_reward_error"),
    *("python_grader_runtime_error", "python_grader_server_error"),
    *("model_grader_parse_error", "model_grader_refusal_error", "model_grader_server_error"),
)


class GraderRequest(Strict):
    """POST .../validate: a grader."""

    grader: dict[Text, Any]


class GradeRequest(GraderRequest):
    """POST .../run: a grader, an answer, and the row that it answers."""

    model_sample: Annotated[Text, Field(max_length=200_000)]
    item: dict[Text, Any] | None = None


def routes(jobs: Jobs | None) -> APIRouter:
    """Return the routes below /v1/fine_tuning/alpha/graders; where training is off, they answer
    404."""
    router = APIRouter(prefix=PREFIX, responses=ERROR_RESPONSES)

    @router.post("/validate")
    async def validate(asked: GraderRequest) -> dict[str, Any]:
        """Return a grader that can be used; one that cannot is refused with all that is wrong."""
        enabled(jobs)
        grader_of(asked.grader)
        return {"grader": asked.grader}

    @router.post("/run")
    async def run(asked: GradeRequest) -> dict[str, Any]:
        """Return what a grader gives an answer."""
        enabled(jobs)
        grader = grader_of(asked.grader)
        return await asyncio.to_thread(graded, grader, asked)

    return router


def graded(grader: Grader, asked: GradeRequest) -> dict[str, Any]:
    """Return what a grader gives an answer as OpenAI has it; 0 where it gives nothing, with which
    kind of error that was."""
    begun, item, answer = time.perf_counter(), asked.item or {}, asked.model_sample
    errors, scores, reward = dict.fromkeys(ERRORS, False), dict[str, float](), 0.0
    try:
        if isinstance(grader, Multi):
            scores = grades(grader, item, answer)
            reward = grader.of(scores)
        else:
            reward = grade(grader, item, answer)
            scores = {grader.name: reward}
    except RewardFault as fault:
        errors["invalid_variable_error" if fault.kind == "raised" else "other_error"] = True
    return {
        "reward": reward,
        "sub_rewards": scores,
        "metadata": {
            "name": grader.name,
            "type": asked.grader["type"],
            "scores": scores,
            "errors": errors,
            "execution_time": time.perf_counter() - begun,
            "token_usage": None,
            "sampled_model_name": None,
        },
        "model_grader_token_usage_per_model": {},
    }
