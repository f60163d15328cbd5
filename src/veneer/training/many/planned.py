"""The memory of several runs that share the passes over one base."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from veneer.errors import ConfigError
from veneer.files import nearest_existing, size_of
from veneer.plan.amounts import Amount, amount
from veneer.plan.plan import Plan, make_plan
from veneer.run_directory import RunDirectory
from veneer.training.planned import with_rows
from veneer.training.preflight import IN_A_PASS, Preflight, bytes_on_disk
from veneer.training.prepare import Prepared


class DoesNotFit(ConfigError):
    """Jobs that train together need more memory, or more of the disk, than is there."""


def plan_together(jobs: Sequence[Prepared], tokens_per_pass: int) -> Plan:
    """Return what jobs need together: the base and one pass, as the job needs them that needs most,
    and every job's adapter, gradients and moments.

    tokens_per_pass: at most, in a pass that is shared
    """
    plans = []
    longest = max(job.rows.longest for job in jobs)
    batches = [job.recipe.training.batch_tokens for job in jobs]
    tokens = max(*batches, min(tokens_per_pass, sum(batches)))
    for job in jobs:
        assert job.ahead.plan is not None
        plan = with_rows(job.ahead.plan, job.recipe, longest)
        config = replace(plan.config, tokens_per_batch=tokens)
        plans.append(
            make_plan(config, plan.sizes, plan.adapted, runtime=plan.runtime, on_card=plan.on_card)
        )
    most = max(plans, key=lambda plan: plan.memory.peak)
    of_all = {
        name: _sum(name, [getattr(plan.memory, name) for plan in plans])
        for name in ("adapters", "gradients", "optimizer")
    }
    return replace(most, memory=replace(most.memory, **of_all))


def check_fits_together(plan: Plan, available: int | None) -> None:
    """Raise DoesNotFit, with what would make it fit, where jobs need more memory than is there.

    available: what the process has and may still take, in bytes, None for not known.
    """
    if available is not None and plan.memory.peak > available:
        raise DoesNotFit(
            f"These jobs would need {plan.memory.peak / 1e9:.2f} GB at their peak, but there is "
            f"{available / 1e9:.2f} GB. Train fewer of them at a time, or take fewer --bits, less "
            "--tokens-per-pass and --tokens-per-batch, or --recompute full. To go ahead all the "
            "same: --ignore-plan."
        )


def check_space_together(
    jobs: Collection[Preflight], device: torch.device, *, merges: bool
) -> None:
    """Raise DoesNotFit where a disk does not hold what stays of all jobs that write to it."""
    needed: Counter[int] = Counter()  # by the number of the disk
    for job in jobs:
        out = job.recipe.out
        place = nearest_existing(out)
        disk = place.stat().st_dev
        free = shutil.disk_usage(place).free
        if job.plan is not None:
            bytes_of = bytes_on_disk(job.plan, job.recipe, device, merges=merges)
            own = sum(bytes_of.values()) - bytes_of.get(IN_A_PASS, 0)  # which they share
            needed[disk] += max(0, own - size_of(RunDirectory(out).checkpoints))  # which go
        if needed[disk] > free:
            raise DoesNotFit(
                f"These jobs, up to that in {out}, need {needed[disk] / 1e6:,.0f} MB, but the disk "
                f"has {free / 1e6:,.0f} MB. Train fewer of them at a time, name another "
                "place by --out, or go ahead by --ignore-plan."
            )


def _sum(name: str, amounts: Sequence[Amount]) -> Amount:
    return amount(name, *(term for each in amounts for term in each.terms))
