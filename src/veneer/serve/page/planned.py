"""What the planner says of a training before it is asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from veneer.adapter.config import LoRA
from veneer.errors import VeneerError
from veneer.machine import free_bytes
from veneer.models.device import resolve_device
from veneer.plan.plan import Plan, make_plan
from veneer.serve.jobs.settings import TrainingBase
from veneer.training.choose import choose
from veneer.training.config import TrainConfig
from veneer.training.planned import plan_run
from veneer.training.recipe import Recipe

# Each token is multiplied by each frozen weight forward and on the way back, two operations each,
# and a step takes up to twice as long as its products (docs/performance.md).
OPERATIONS, MORE = 4, 2.0
MOST_LENGTHS = 100_000  # rows of which passes are chosen: more have the fewest passes anyway


@dataclass(frozen=True)
class Asked:
    """What a person is about to train: an adapter, and the rows, as far as they are known.

    tokens: of all rows together. epochs: None for as many as the rows ask for.
    """

    rank: int
    targets: str
    rows: int = 0
    tokens: int = 0
    epochs: float | None = None


def planned(base: TrainingBase, asked: Asked, speed: float | None) -> dict[str, Any]:
    """Return the parameters that would train, the most memory that it would take, with rows as long
    as they may be, and that which is free now; `why` there is no plan, where there is none.

    speed: tokens a second of an earlier run over this base. With rows, `passes` are those over
    them, and `seconds` about what they take while nothing else is computed.
    """
    result: dict[str, Any] = dict.fromkeys(("parameters", "memory", "why", "passes", "seconds"))
    result["free"] = free_bytes()
    try:
        plan = _plan(base, asked.rank, asked.targets)
    except VeneerError as error:
        return {**result, "why": str(error)}
    result |= {"parameters": plan.trained.count, "memory": plan.memory.peak}
    if asked.rows and asked.tokens:
        result["passes"] = passes = _passes(asked)
        if speed is None and resolve_device(base.device).type == "cpu":
            each = MORE * OPERATIONS * plan.sizes.active_parameters
            speed = operations_per_second(base.dtype) / each
        result["seconds"] = None if not speed else passes * asked.tokens / speed
    return result


def _passes(asked: Asked) -> float:
    """Return the passes that a run makes over rows of a mean length."""
    rows = min(asked.rows, MOST_LENGTHS)
    lengths = [max(1, round(asked.tokens / asked.rows))] * rows
    given = TrainConfig(epochs=asked.epochs)
    passes = choose(given, lengths, what_trains=LoRA(), hidden_size=None).epochs
    assert passes is not None
    return passes


_fastest: dict[torch.dtype, float] = {}  # operations a second, the most that was seen so far


def operations_per_second(dtype: str) -> float:
    """Return the additions and multiplications a second in products of the shape of a step's, as
    fast as this machine ever was: it may be busy now."""
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    x, weight = torch.ones(512, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    for _ in range(5):
        start = time.perf_counter()
        x @ weight
        speed = 2 * x.numel() * len(weight) / (time.perf_counter() - start)
        _fastest[kind] = max(speed, _fastest.get(kind, 0.0))
    return _fastest[kind]


@lru_cache(maxsize=64)
def _plan(base: TrainingBase, rank: int, targets: str) -> Plan:
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
    return make_plan(plan.config, plan.sizes, plan.adapted)
