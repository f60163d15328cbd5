"""Whole runs of `tune` over one base at a time, each with its data and its results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from veneer.adapter.attach import detach
from veneer.adapter.use import use
from veneer.data.sources import spelt
from veneer.errors import ConfigError
from veneer.models.device import begin_peak, resolve_device
from veneer.models.fingerprint import fingerprint
from veneer.models.load import Base, load_base
from veneer.plan.plan import Plan
from veneer.processes.world import World
from veneer.run_directory import RunDirectory
from veneer.training.config import TOKENS_PER_PASS
from veneer.training.events import Event, Measured, Notice, Planned
from veneer.training.many.planned import (
    check_fits_together,
    check_space_together,
    plan_together,
)
from veneer.training.many.problems import JobProblems
from veneer.training.many.running import Job
from veneer.training.many.schedule import check_limit
from veneer.training.many.train import train_many
from veneer.training.memory import begin_measuring
from veneer.training.metrics import record
from veneer.training.plan_before import why_no_plan
from veneer.training.planned import available_memory, check_host
from veneer.training.preflight import Preflight, preflight
from veneer.training.prepare import Prepared, prepare
from veneer.training.recipe import Recipe
from veneer.training.results import clear_state, to_the_end
from veneer.training.rows import RunRows
from veneer.training.tune import attach_job

ALL = ""  # the name with events that are of no job, but of all of them
# Settings of the base and of passes, which jobs share.
SHARED = ("model", "device", "dtype", "bits", "pack_head", "shard", "offload", "recompute")
EXTENDS = "extends the base's vocabulary, which all jobs share; train it by itself"


def tune_many(
    recipes: Mapping[str, Recipe],
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
    should_stop: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, Event]]:
    """Train as each recipe says, by `train_many`, and yield each event with the name of its job, or
    with "" where it is of all.

    Every recipe has a directory of its own, `out`, with what `tune` would leave there. `resume`
    goes on from the newest checkpoint in each, and starts those that have none. A job that fails
    ends by Failed, and the others go on.

    Raises, before the base is loaded, ConfigError for whatever is wrong with any of the recipes,
    all of it at once and by the names of the jobs.
    """
    check_limit(tokens_per_pass)
    _check_together(recipes)
    if resume and not any(recipe.out.exists() for recipe in recipes.values()):
        places = ", ".join(str(recipe.out) for recipe in recipes.values())
        raise ConfigError(f"There are no runs to go on with: none of {places} exists.")
    problems = JobProblems()
    begun: dict[str, Preflight] = {}
    resumes = {name: resume and recipe.out.exists() for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        with problems.of(name):
            begun[name] = ahead = preflight(
                recipe,
                resume=resumes[name],
                force=force,
                ignore_space=ignore_plan,
                beside=next(iter(begun.values()), None),
            )
            if ahead.dtype_name != (shared := next(iter(begun.values())).dtype_name):
                raise ConfigError(
                    f"its checkpoint was computed in {ahead.dtype_name}, and the first job is in "
                    f"{shared}; go on with it by itself"
                )
    problems.end()
    device = resolve_device(next(iter(recipes.values())).device)
    if not ignore_plan:
        check_space_together(begun.values(), device)
    prepared: dict[str, Prepared] = {}
    rows: dict[Any, RunRows] = {}  # by all that decides them
    for name, ahead in begun.items():
        with problems.of(name):
            key = _key_of_rows(ahead)
            work = prepare(ahead, rows=rows.get(key))
            if ahead.start is not None and ahead.start.new_tokens:
                raise ConfigError(f"{ahead.recipe.start_from} {EXTENDS}")
            prepared[name] = each = yield from _named(name, work)
            rows[key] = each.rows
    problems.end()
    first = next(iter(prepared.values()))
    plan: Plan | None = None
    if why := next(filter(None, (why_no_plan(each, device) for each in begun.values())), ""):
        yield ALL, Notice(f"No memory is planned for these jobs: {why}")
    else:
        plan = plan_together([*prepared.values()], tokens_per_pass)
        available = available_memory(device)
        if not ignore_plan:
            check_fits_together(plan, available)
            check_host(plan, 1)
        yield ALL, Planned(plan, available)
    recipe = first.recipe
    if recipe.shard == "base":
        yield ALL, Notice("The base is not sharded: jobs train in one process.")
    base = load_base(
        recipe.model,
        device=recipe.device,
        dtype=first.ahead.dtype_name,
        bits=recipe.loaded_bits,
        pack_head=recipe.pack_head,
        tokenizer=first.ahead.tokenizer,
        offload=recipe.offload,
        offload_directory=recipe.out,
    )
    for text in base.notices:
        yield ALL, Notice(text)
    of_base = fingerprint(base.model, base.tokenizer)
    jobs: dict[str, Job] = {}
    names = {f"job {number}": name for number, name in enumerate(prepared)}  # of adapters
    for adapter, name in names.items():
        with problems.of(name):
            base.model.requires_grad_(False)
            attaching = attach_job(prepared[name], base, force=force, name=adapter)
            yield from ((name, event) for event in attaching)
            jobs[adapter] = _job(
                prepared[name], base, of_base, adapter, plan=plan, resume=resumes[name]
            )
    problems.end()
    for name, each in prepared.items():
        if not resumes[name]:
            clear_state(RunDirectory(each.recipe.out))
    use(base.model, None)  # adapters go as their jobs end
    begin_measuring()
    begin_peak(base.model.device)
    measured = False
    for adapter, event in train_many(
        base.model,
        jobs,
        tokens_per_pass=tokens_per_pass,
        should_stop=lambda adapter: should_stop(names[adapter]),
    ):
        if not isinstance(event, Measured):
            yield names[adapter], event
        elif not measured:  # for the first, no model has been merged yet, which takes more
            measured = True
            yield ALL, event


def _job(
    prepared: Prepared,
    base: Base,
    of_base: Mapping[str, str],
    adapter: str,
    *,
    plan: Plan | None,
    resume: bool,
) -> Job:
    """Return a run as a job, which writes what `tune` does and then detaches its adapter."""
    recipe, rows = prepared.recipe, prepared.rows
    run, identity = RunDirectory(recipe.out), prepared.identity(of_base)

    def through(events: Iterator[Event]) -> Iterator[Event]:
        results = to_the_end(events, recipe, base, identity, plan=plan, resume=resume)
        try:
            yield from record(results, run)
        finally:
            detach(base.model, adapter)

    return Job(
        rows.examples,
        recipe.training,
        held_out=rows.held_out,
        directory=run.checkpoints,
        identity={"computed_in": prepared.ahead.dtype_name, **identity},
        resume=resume,
        through=through,
    )


def _named(
    name: str, work: Generator[Event, None, Prepared]
) -> Generator[tuple[str, Event], None, Prepared]:
    while True:
        try:
            event = next(work)
        except StopIteration as done:
            return done.value
        yield name, event


def _key_of_rows(ahead: Preflight) -> Any:
    """Return all that decides a run's rows and what is said of them, to compare it by."""
    recipe = ahead.recipe
    reports = recipe.out if recipe.rows.deduplicate or recipe.rows.skip_bad_rows else None
    invocation = recipe.lora.invocation
    return (tuple(spelt(recipe.data)), recipe.rows, recipe.training.seed, invocation, reports)


def _check_together(recipes: Mapping[str, Recipe]) -> None:
    """Raise ConfigError for recipes that cannot share a base and its passes."""
    problems = JobProblems()
    if not recipes:
        raise ConfigError("There are no jobs.")
    if World.current().size > 1:
        raise ConfigError("Several jobs train in one process; start one alone, without torchrun.")
    first = next(iter(recipes.values())).settings()
    places = [recipe.out.absolute() for recipe in recipes.values()]
    for name, recipe in recipes.items():
        own = recipe.settings()
        wrong = [
            f"{key} is {own[key]!r}, but {first[key]!r} for the first job, and all share it"
            for key in SHARED
            if own[key] != first[key]
        ]
        if recipe.method.method != "lora":
            wrong.append(f"{recipe.method.method} is no low-rank adapter; train it by itself")
        if recipe.rows.new_words is not None:
            wrong.append(f"new_words {EXTENDS}")
        if recipe.training.context_parallel > 1 or recipe.training.replay_passes:
            wrong.append("context_parallel and replay_passes are for a job alone")
        if name == ALL:
            wrong.append("a job must have a name")
        if places.count(recipe.out.absolute()) > 1:
            wrong.append(f"{recipe.out} is another job's directory too")
        for text in wrong:
            problems.add(name, text)
    problems.end()
