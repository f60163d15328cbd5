"""The memory of a run over several processes: what each needs, and whether they shard the base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.data.packing import StepOrder
from veneer.errors import ConfigError
from veneer.plan.devices import DevicePlan, best, least_changes, ways, whole_by_time
from veneer.plan.fit import flags
from veneer.plan.plan import Plan, replanned
from veneer.processes.world import World
from veneer.training.planned import available_memory
from veneer.training.recipe import Recipe

STEPS = 50  # of which the tokens that a process gets are looked at


def plan_of_each(
    plan: Plan,
    recipe: Recipe,
    lengths: Sequence[int] | NDArray[np.integer],
    world: World,
    device: torch.device,
    *,
    shard: str = "none",
    ignore: bool = False,
) -> tuple[DevicePlan, int | None]:
    """Return how the processes of a world train by `plan`, and the bytes that each may have.

    lengths: tokens of each row. All processes must ask, and get the same. Raises ConfigError as
    `share_out` does.
    """
    memory, pieces = memory_of_each(world, device), recipe.training.context_parallel
    plan = dealt(plan, recipe, lengths, world.size // pieces)
    way = share_out(plan, world.size, memory, shard=shard, pieces=pieces, ignore=ignore)
    return way, memory


def memory_of_each(world: World, device: torch.device) -> int | None:
    """Return the bytes that each process of a world may have, None where a system does not say.

    device: on which this process computes, a card of its own or the processor. Processes of one
    machine share its memory evenly; on unlike machines or cards, the least decides.
    """
    free = available_memory(device)
    shares = device.type == "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if shares else 1
    each = 0 if free is None else free // here
    least = -world.most(-each)
    return least or None


def dealt(
    plan: Plan, recipe: Recipe, lengths: Sequence[int] | NDArray[np.integer], count: int
) -> Plan:
    """Return the plan with the tokens of a pass that one of `count` processes gets (or groups that
    share a pass), the most of any in the first steps of the run. lengths: tokens of each row."""
    training = recipe.training
    assert training.tokens_per_step is not None
    if count == 1:
        return plan
    limits = training.tokens_per_step, training.batch_tokens
    order = StepOrder(lengths, *limits, training.seed)
    passes = (
        sum(int(lengths[row]) for row in rows)
        for step in islice(order.epoch(0), STEPS)
        for batches in order.deal(step, count)
        for rows in batches
    )
    tokens = max([plan.config.length, *passes])
    return replanned(plan, replace(plan.config, tokens_per_batch=tokens))


def share_out(
    plan: Plan,
    count: int,
    memory: int | None,
    *,
    shard: str = "auto",
    pieces: int = 1,
    ignore: bool = False,
) -> DevicePlan:
    """Return how `count` processes train by `plan`, what one of them computes.

    memory: bytes that each may have, None for not known. shard: what of the base is sharded, none
    or base, or auto: the base only where it would not fit otherwise. pieces: processes that share
    the tokens of a pass. ignore: whether it may need more. Raises ConfigError where it does, with
    what would fit.
    """
    each = [way for way in ways(plan, count, pieces) if shard in ("auto", way.sharded)]
    if not each:
        raise ConfigError(
            "shard base needs several processes and a frozen base in memory: it suits neither one "
            "process, nor weights that train, nor a base that is mapped from the disk."
        )
    fitting = (way for way in each if memory is None or way.peak <= memory)
    way = next(fitting, None) or (each[-1] if ignore else None)
    if way is None:
        assert memory is not None
        raise ConfigError(_refusal(plan, each[-1], memory))
    return way


def _refusal(plan: Plan, way: DevicePlan, memory: int) -> str:
    """Return why processes cannot train so, and how they could."""
    count = way.count
    proposals: list[tuple[str, DevicePlan]] = []
    whole, sharded = whole_by_time(plan, memory), best(plan, count, memory, way.pieces)
    if whole is not None:
        proposals.append((flags(plan.config, whole.config), DevicePlan(whole, count)))
    if sharded is not None:
        proposals.append(("", sharded))
    proposals += _fewer_processes(plan, way, memory)
    proposals += [
        (_flags(plan, change), change)
        for change in least_changes(plan, count, memory)
        if change.count == count and change.plan.config not in (plan.config, whole and whole.config)
    ]
    ways_out = "; ".join(
        f"{text}{' --shard base' * (change.sharded == 'base')}".strip()
        + f" ({_gb(change.peak)} each)"
        for text, change in proposals
    )
    how = f" It would fit by: {ways_out}." if ways_out else " No settings make it fit."
    return (
        f"Each of {count} processes would need {_gb(way.peak)} at its peak"
        f"{', with a sharded base' * (way.sharded == 'base')}, but there is {_gb(memory)} for "
        f"each.{how} To go ahead all the same: --ignore-plan."
    )


def _fewer_processes(plan: Plan, way: DevicePlan, memory: int) -> Iterator[tuple[str, DevicePlan]]:
    """Yield the most processes of this machine that fit: each has more memory, and more tokens."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", way.count)) == way.count
    if way.pieces > 1 or not alone or plan.on_card:
        return  # a row needs them, there are other machines, or each has a card's memory anyway
    config = plan.config
    for count in range(way.count - 1, 0, -1):
        tokens = -(-config.tokens_per_batch * way.count // count)
        fewer = replanned(plan, replace(config, tokens_per_batch=tokens, max_length=config.length))
        fitting = best(fewer, count, memory * way.count // count)
        if fitting is not None:
            yield f"--processes {count}", fitting
            return


def _flags(plan: Plan, way: DevicePlan) -> str:
    pieces = f" --context-parallel {way.pieces}" * (way.pieces > 1)
    return flags(plan.config, way.plan.config) + pieces


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
