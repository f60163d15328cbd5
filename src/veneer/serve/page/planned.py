"""What the planner says of a training before it is asked for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from veneer.adapter.config import LoRA
from veneer.errors import VeneerError
from veneer.plan.fit import free_bytes
from veneer.plan.plan import make_plan
from veneer.serve.jobs.settings import TrainingBase
from veneer.training.planned import plan_run
from veneer.training.recipe import Recipe


def planned(base: TrainingBase, rank: int, targets: str) -> dict[str, Any]:
    """Return the parameters that would train, the most memory that it would take, with rows as long
    as they may be, and that which is free now; `why` there is no plan, where there is none."""
    try:
        parameters, peak = _amounts(base, rank, targets)
    except VeneerError as error:
        return {"parameters": None, "memory": None, "free": free_bytes(), "why": str(error)}
    return {"parameters": parameters, "memory": peak, "free": free_bytes(), "why": None}


@lru_cache(maxsize=64)
def _amounts(base: TrainingBase, rank: int, targets: str) -> tuple[int, int]:
    recipe = Recipe(
        model=base.name,
        data="",
        lora=LoRA(rank=rank, targets=targets),
        dtype=base.dtype,
        bits=base.bits,
        pack_head=base.pack_head,
        device=base.device,
    )
    dtype = torch.float32 if base.dtype == "float32" else torch.bfloat16
    plan = plan_run(recipe, dtype)
    # In a process of its own, which holds nothing of this one's.
    plan = make_plan(plan.config, plan.sizes, plan.adapted)
    return plan.trained.count, plan.memory.peak
