"""The memory of a run, planned before its base is loaded and compared with what there is."""

from __future__ import annotations

import os
from collections.abc import Generator

import torch

from veneer.data.columns import lengths_of
from veneer.models.device import has_memory_of_its_own, resolve_device
from veneer.plan.plan import Plan
from veneer.processes.world import World
from veneer.training.events import Event, Notice, Planned, Space
from veneer.training.live_teacher import bytes_of_live_teacher
from veneer.training.planned import available_memory, check_fits, check_host, with_rows
from veneer.training.planned_processes import plan_of_each
from veneer.training.preflight import Preflight, bytes_on_disk, free_on_disk
from veneer.training.recipe import Recipe
from veneer.training.rows import RunRows
from veneer.training.teacher import bytes_of_teacher, check_space_of_teacher


def plan_before(
    recipe: Recipe, ahead: Preflight, rows: RunRows, world: World, *, ignore_plan: bool
) -> Generator[Event, None, tuple[Plan | None, bool]]:
    """Return the plan of this process's memory with these rows, None where there is none for the
    base's architecture, and whether the base is sharded.

    Raises ConfigError where the run does not fit, unless that is to be ignored.
    """
    if recipe.shard == "base" and world.size == 1:
        yield Notice("The base is not sharded: one process alone trains. Give --processes N.")
    device = resolve_device(recipe.device)
    why = why_no_plan(ahead, device)
    if ahead.plan is None or why:
        yield Notice(f"No memory is planned for this run: {why}")
        return None, world.size > 1 and recipe.shard == "base"
    teacher = bytes_of_live_teacher(recipe, ahead.dtype, ahead.config)
    plan, sharded = with_rows(ahead.plan, recipe, rows.longest, teacher=teacher), False
    if world.size > 1:
        lengths = lengths_of(rows.examples)
        way, available = plan_of_each(
            plan, recipe, lengths, world, device, shard=recipe.shard, ignore=ignore_plan
        )
        plan, sharded = way.of_one, way.sharded == "base"
    else:
        available = available_memory(device)
        if not ignore_plan:
            check_fits(plan, available, recipe.model)
    if not ignore_plan:
        check_host(plan, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    yield Planned(plan, available, world.size)
    if plan.notice:
        yield Notice(plan.notice)
    if world.writes:
        needed = bytes_on_disk(plan, recipe, device)
        if recipe.objective.teacher is not None and not recipe.objective.on_policy:
            splits = {"train": rows.examples, "valid": rows.held_out}
            given = bytes_of_teacher(
                recipe.objective, splits, plan.sizes.vocab, before=ahead.before
            )
            if not ignore_plan:
                check_space_of_teacher(given)
            needed["what the teacher gives"] = given
        yield Space(needed, free_on_disk(recipe.out))
    return plan, sharded


def why_no_plan(ahead: Preflight, device: torch.device) -> str:
    """Return why no memory is planned for a run, or nothing where it is."""
    if device.type != "cpu" and not has_memory_of_its_own(device):
        return f"plans are of processors and of cards with their own memory, and this is {device}."
    return ahead.why_no_plan
