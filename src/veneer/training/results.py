"""What a run leaves: its verdict, its adapter, and the merged model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, get_args

from veneer.adapter.certify import certify
from veneer.adapter.merge import merge, why_not_mergeable
from veneer.adapter.method import MethodName
from veneer.files import remove_directory, size_of
from veneer.formats import adapters, merged, native
from veneer.formats.checkpoint import about_training
from veneer.models.load import Base
from veneer.plan.plan import Plan
from veneer.processes.world import ALONE, World
from veneer.run_directory import RunDirectory
from veneer.training import checkpoint
from veneer.training.choose import usual_rate
from veneer.training.events import (
    Doing,
    Event,
    Measured,
    Merged,
    Notice,
    Started,
    Stopped,
    Trained,
    Verdict,
    Written,
)
from veneer.training.planned import free_on, planned_and_measured, why_no_merge
from veneer.training.recipe import Recipe
from veneer.training.verdict import judge

# What to do where rounding takes what was learnt.
KEEP_IT = "The adapter itself holds all of it; use that, or veneer merge --dtype float32."
LEARN_MORE = "So little was learnt that float32 would not mend it: train longer."


def to_the_end(
    events: Iterator[Event],
    recipe: Recipe,
    base: Base,
    identity: dict[str, Any],
    *,
    plan: Plan | None = None,
    world: World = ALONE,
    resume: bool,
    merges: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Pass on the events of the training, judge it, write the results, and say what is written.

    merges: write the merged model too, unless `should_stop` returns True after a training in one
        process
    """
    run = RunDirectory(recipe.out)
    verdict: Verdict | None = None
    steps = weights_of = 0
    for event in events:
        if isinstance(event, Started):  # so the checkpoint, if there is one, belongs to this run
            run.write_recipe(recipe.settings())
            steps = event.steps
        if isinstance(event, Trained):
            usual_lr = usual_rate(recipe, base.model.config)
            yield (verdict := judge(run.read_metrics(), usual_lr=usual_lr))
            weights_of = event.weights_of
        yield event
        if isinstance(event, Stopped) and event.reason == "interrupted":
            return
    assert verdict is not None
    about = about_training(identity, step=weights_of, steps=steps)
    with world.leading():
        yield from _save(recipe, base, plan, about)
        if merges and world.size == 1 and should_stop():
            yield Stopped(steps, "interrupted")
            return
        written = {recipe.adapter} if recipe.method.method != "full" else set()
        if merges and (yield from _merge(recipe, base, plan, verdict, resume=resume)):
            written.add(recipe.merged)
        if not resume:
            clear_results(run, keep=written)


def _save(recipe: Recipe, base: Base, plan: Plan | None, about: dict[str, Any]) -> Iterator[Event]:
    """Write the adapter, and say what is written. about: the training, for its file."""
    if plan is not None and (peaks := planned_and_measured(plan, base.model.device)):
        yield Measured(*peaks)

    if recipe.method.method != "full":  # whose adapter would be the merged model again
        adapters.save(base.model, recipe.adapter, tokenizer=base.tokenizer, training=about)
        yield Written("adapter", recipe.adapter, size_of(recipe.adapter))


def clear_state(run: RunDirectory) -> None:
    """Make way for a new run, once everything about it has proved right."""
    for file in (run.metrics, run.recipe, run.progress, run.samples, run.samples_page):
        file.unlink(missing_ok=True)
    checkpoint.remove_all(run.checkpoints)


def clear_results(run: RunDirectory, *, keep: Collection[Path]) -> None:
    """Remove what an earlier run left as its results, of whatever method, and nothing else. keep:
    what this run has written"""
    for method in get_args(MethodName):
        for place, markers in (
            (run.adapter(method), (native.config_name(method),)),
            (run.merged(method), merged.MARKERS),
        ):
            if place not in keep and any((place / marker).is_file() for marker in markers):
                remove_directory(place)  # half of it would be taken for a whole one


def _merge(
    recipe: Recipe, base: Base, plan: Plan | None, verdict: Verdict, *, resume: bool
) -> Generator[Event, None, bool]:
    """Write the merged model, with a certificate, where there can be one, and where the run did not
    diverge, unless that model is all that stays of it. Return whether it is written."""
    command, device = recipe.merge_command, base.model.device
    why = why_not_mergeable(base.model, command) or why_no_merge(plan, free_on(device), command)
    if verdict.kind == "diverged" and recipe.method.method != "full":
        why = why or f"the run diverged. To make one all the same: {command}"
    if why:
        is_stale = resume and recipe.merged.exists()
        stale = f"That in {recipe.merged} is of fewer steps. " if is_stale else ""
        yield Notice(f"{stale}No merged model is written: {why}")
        return False
    yield Doing("merging")
    plain = merge(base.model)
    if recipe.method.method == "lora":  # all other weights are taken as they are
        yield Doing("comparing the merged model with base and adapter")
        certificate = certify(base.model, plain, base.tokenizer)
        yield Merged(certificate)
        if problems := certificate.problems():
            # No reason to fail: the run's result is the adapter, and that is whole.
            lost = "; ".join(problems)
            advice = LEARN_MORE if verdict.kind == "hardly learnt" else KEEP_IT
            yield Notice(f"The merged model is not what was learnt: {lost}. {advice}")
    yield Doing("writing the merged model")
    merged.write_model(plain, base.tokenizer, recipe.merged)
    yield Written("merged model", recipe.merged, size_of(recipe.merged))
    return True
