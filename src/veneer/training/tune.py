"""The main job from end to end: a base and data in, an adapter and a merged model out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from veneer.adapter.active import active_adapters_of
from veneer.adapter.attach import attach
from veneer.adapter.new_tokens import add_tokens, new_tokens_of
from veneer.adapter.report import report_quantized, report_trained
from veneer.errors import VeneerWarning
from veneer.files import remove_leftovers
from veneer.formats.training import computed_in, other_base
from veneer.models.device import begin_peak
from veneer.models.fingerprint import fingerprint
from veneer.models.load import Base, load_base
from veneer.processes.context import check_divides
from veneer.processes.world import ALONE, World
from veneer.rewards.judged import Weighted
from veneer.run_directory import RunDirectory
from veneer.run_lock import RunLock
from veneer.training import start_from
from veneer.training.begin import DEFAULT
from veneer.training.events import Event, ModelReady, Notice, Stopped
from veneer.training.loop import train
from veneer.training.memory import begin_measuring
from veneer.training.metrics import record
from veneer.training.on_policy.begin import prompts_of, rewards_of, with_course
from veneer.training.on_policy.run import train_on_policy
from veneer.training.plan_before import plan_before
from veneer.training.preflight import Preflight, check_directory, preflight
from veneer.training.prepare import Prepared, prepare
from veneer.training.recipe import Recipe
from veneer.training.results import clear_state, to_the_end


def tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train as the recipe says, write both results below `recipe.out`, and yield what happens.

    `resume` goes on from the newest checkpoint there; `force` replaces an earlier run's results,
    and starts from an adapter of another base; `ignore_plan` goes ahead where the plan needs more
    memory, or disk, than there is. Processes that torch.distributed has joined train together, each
    with the same recipe: all yield the events of the training, one writes.
    Raises VeneerError of the kind that fits where a setting, the base or the data cannot be used.
    """
    run, world = RunDirectory(recipe.out), World.current()
    check_divides(world.size, recipe.training.context_parallel)
    # In one process: the others may be on machines that have no such directory.
    ahead = world.first(
        lambda: preflight(
            recipe,
            resume=resume,
            force=force,
            ignore_space=ignore_plan,
            processes=world.size,
        )
    )
    lock = RunLock(run.path)
    try:
        if killed := world.first(partial(take, lock, run.path, may_hold_a_run=resume or force)):
            yield Notice(killed)
        with rewards_of(ahead.recipe, processes=world.size) as rewards:
            yield from _tune(
                *(ahead, run, world, rewards),
                resume=resume,
                force=force,
                ignore_plan=ignore_plan,
                should_stop=should_stop,
            )
    finally:
        lock.release()


def take(lock: RunLock, out: Path, *, may_hold_a_run: bool) -> str:
    """Take the lock of a run's directory, look again what is there, and remove what a killed run
    left half-written. Return what to say of that run."""
    killed, run = lock.take(), RunDirectory(out)
    check_directory(run, may_hold_a_run=may_hold_a_run)
    for directory in (run.path, run.checkpoints):
        remove_leftovers(directory)
    return killed


def _tune(
    ahead: Preflight,
    run: RunDirectory,
    world: World,
    rewards: Sequence[Weighted],
    *,
    resume: bool,
    force: bool,
    ignore_plan: bool,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    """Train, once the run's directory is this process's own. rewards: of samples, if it learns from
    these."""
    on_samples = ahead.recipe.objective.shape == "prompts"
    prompts = prompts_of(ahead, rewards) if on_samples else None
    ahead = with_course(ahead) if on_samples else ahead
    prepared = yield from prepare(ahead, world=world, rows=prompts)
    recipe, rows = prepared.recipe, prepared.rows
    plan, sharded = yield from plan_before(recipe, ahead, rows, world, ignore_plan=ignore_plan)

    base = load_base(
        recipe.model,
        device=recipe.device,
        dtype=ahead.dtype_name,
        bits=recipe.loaded_bits,
        pack_head=recipe.pack_head,
        tokenizer=ahead.tokenizer,
        world=world if sharded else ALONE,
        offload=recipe.offload,
        offload_directory=recipe.out,
    )
    if sharded:
        yield Notice(f"The base is sharded: each of {world.size} processes holds its part of it.")
    yield from map(Notice, base.notices)
    if rows.new_tokens:
        add_tokens(base.model, base.tokenizer, rows.new_tokens)
    yield from attach_job(prepared, base, force=force)
    identity = prepared.identity(fingerprint(base.model, base.tokenizer))

    if not resume and world.writes:
        clear_state(run)
    begin_measuring()
    begin_peak(base.model.device)
    course: dict[str, Any] = {
        "objective": recipe.objective,
        "identity": {"computed_in": ahead.dtype_name, **identity},
        "resume": resume,
        "should_stop": should_stop,
    }
    if prompts is not None:
        events = train_on_policy(
            *(base.model, base.tokenizer, prompts.prompts, recipe.training),
            on_policy=recipe.on_policy,
            rewards=rewards,
            held_out=prompts.to_evaluate,
            directory=run,
            **course,
        )
    else:
        events = train(
            *(base.model, rows.examples, recipe.training),
            held_out=rows.held_out,
            directory=run.checkpoints,
            world=world,
            **course,
        )
    if world.writes:
        results = to_the_end(
            *(events, recipe, base, identity),
            plan=plan,
            world=world,
            resume=resume,
            should_stop=should_stop,
        )
        yield from record(results, run)
        return
    interrupted = False
    for event in events:
        interrupted = isinstance(event, Stopped) and event.reason == "interrupted"
        yield event
    if not interrupted:
        world.follow()


def attach_job(
    prepared: Prepared, base: Base, *, force: bool, name: str = DEFAULT
) -> Iterator[Event]:
    """Attach what a run trains, fresh or from what it starts from, and say what that is."""
    recipe, start, rows = prepared.recipe, prepared.ahead.start, prepared.rows
    if start is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VeneerWarning)  # the report says the same
            attach(
                base.model,
                recipe.what_trains,
                name=name,
                seed=recipe.training.seed,
                tokenizer=base.tokenizer,
            )
    else:
        start_from.begin(base, start, recipe.what_trains, force=force, name=name)
        here = computed_in(base.model)
        if text := other_base(f"The adapter in {recipe.start_from}", start.training, here):
            yield Notice(text)
    report = report_trained(base.model, recipe.what_trains)
    added = new_tokens_of(base.model)
    for new_rows in added.parameters() if added else ():
        new_rows.requires_grad_(True)
    quantized = report_quantized(base.model)
    yield ModelReady(report, rows.new_tokens, prepared.ahead.dtype_name, quantized)
    if report.uncovered:
        yield Notice(report.uncovered)
    yield from map(Notice, report.remarks)
    # Of each checkpoint's adapter too.
    active_adapters_of(base.model).notes[name] = {"system": rows.system} if rows.system else {}
