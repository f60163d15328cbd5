"""The main job from end to end: a base and data in, an adapter and a merged model out."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from transformers import PretrainedConfig

from veneer.adapter.active import active_adapters_of
from veneer.adapter.attach import attach
from veneer.adapter.certify import certify
from veneer.adapter.config import LoRA
from veneer.adapter.merge import merge, why_not_mergeable
from veneer.adapter.method import Method, MethodName
from veneer.adapter.new_tokens import add_tokens, extend_tokenizer, new_tokens_of
from veneer.adapter.report import report_quantized, report_trained
from veneer.data.columns import lengths_of
from veneer.errors import ConfigError, TrainingError, VeneerWarning, joined
from veneer.files import size_of
from veneer.formats import adapters, merged, native
from veneer.formats.checkpoint import about_training
from veneer.formats.training import computed_in, other_base
from veneer.models.device import begin_peak
from veneer.models.fingerprint import fingerprint
from veneer.models.load import Base, load_base
from veneer.plan.plan import Plan
from veneer.processes.context import check_divides
from veneer.processes.world import ALONE, World
from veneer.run_directory import RunDirectory
from veneer.training import checkpoint, start_from
from veneer.training.choose import choose, explain, hidden_size_of, learning_rate
from veneer.training.config import NOT_OF_THE_COURSE, YOUNGER
from veneer.training.events import (
    Doing,
    Event,
    Measured,
    Merged,
    ModelReady,
    Notice,
    Started,
    Stopped,
    Trained,
    Verdict,
    Written,
)
from veneer.training.loop import train
from veneer.training.memory import begin_measuring
from veneer.training.metrics import record
from veneer.training.plan_before import plan_before
from veneer.training.planned import free_on, planned_and_measured, why_no_merge
from veneer.training.preflight import preflight
from veneer.training.recipe import Recipe
from veneer.training.rows import RunRows, in_every_process, load_rows
from veneer.training.state import other_settings
from veneer.training.verdict import judge

# As YOUNGER, of all of a recipe.
YOUNGER_SETTINGS = {
    **YOUNGER,
    "pack_head": False,
    "method": "lora",
    "train_head": False,
    "train_norms": False,
    "dora": False,
    "lora_fa": False,
    "invocation": None,
    "expert_rank": None,
    "shared_expert_a": False,
    "long_rows": None,
    "deduplicate": False,
    "from": None,
}
# What to do where rounding takes what was learnt.
KEEP_IT = "The adapter itself holds all of it; use that, or veneer merge --dtype float32."
LEARN_MORE = "So little was learnt that float32 would not mend it: train longer."


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
    recipe, start, tokenizer = ahead.recipe, ahead.start, ahead.tokenizer
    dtype = str(ahead.dtype).removeprefix("torch.")
    before = ahead.before
    if before:
        _check_goes_on(recipe, before)
    if start is not None:
        yield Notice(f"Starts from {recipe.start_from}: {start_from.in_words(recipe.what_trains)}.")
        if start.new_tokens:
            tokenizer = copy.deepcopy(tokenizer)
            extend_tokenizer(tokenizer, start.new_tokens.tokens)
    rows = yield from in_every_process(world, load_rows(recipe, ahead.config, tokenizer))
    data = rows.identity(before.get("data"))
    if "data" in before:
        _check_goes_on(recipe, before, data=data)
    if start and start.new_tokens and rows.new_tokens:
        raise ConfigError(f"{recipe.start_from} has new tokens, and --new-words can add no others.")
    yield rows.ready
    yield from map(Notice, rows.notices)
    recipe, choices = _choose(recipe, rows, ahead.config)
    if choices:
        yield Notice(choices)
    plan, sharded = yield from plan_before(recipe, ahead, rows, world, ignore_plan=ignore_plan)

    base = load_base(
        recipe.model,
        device=recipe.device,
        dtype=dtype,
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
    if start is None:
        _attach(recipe, base)
    else:
        start_from.begin(base, start, recipe.what_trains, force=force)
        here = computed_in(base.model)
        if text := other_base(f"The adapter in {recipe.start_from}", start.training, here):
            yield Notice(text)
    yield from _report(recipe, base, dtype, rows.new_tokens)
    # Of each checkpoint's adapter too.
    active_adapters_of(base.model).notes["default"] = {"system": rows.system} if rows.system else {}
    identity = _identity(recipe, base, data)

    if not resume and world.writes:
        _clear_state(run)
    begin_measuring()
    begin_peak(base.model.device)
    events = train(
        base.model,
        rows.examples,
        recipe.training,
        held_out=rows.held_out,
        directory=run.checkpoints,
        identity={"computed_in": dtype, **identity},
        resume=resume,
        should_stop=should_stop,
        world=world,
    )
    if world.writes:
        results = _to_the_end(events, recipe, run, base, plan, identity, world, resume=resume)
        yield from record(results, run)
        return
    interrupted = False
    for event in events:
        interrupted = isinstance(event, Stopped) and event.reason == "interrupted"
        yield event
    if not interrupted:
        world.follow()


def _to_the_end(
    events: Iterator[Event],
    recipe: Recipe,
    run: RunDirectory,
    base: Base,
    plan: Plan | None,
    identity: dict[str, Any],
    world: World,
    *,
    resume: bool,
) -> Iterator[Event]:
    """Pass on the events of the training, judge it, write the results, and say what is written."""
    verdict: Verdict | None = None
    steps = weights_of = 0
    for event in events:
        if isinstance(event, Started):  # so the checkpoint, if there is one, belongs to this run
            run.write_recipe(recipe.settings())
            steps = event.steps
        if isinstance(event, Trained):
            usual_lr = learning_rate(
                recipe.what_trains,
                hidden_size_of(base.model.config),
                lora_plus_ratio=recipe.training.lora_plus_ratio,
            )
            yield (verdict := judge(run.read_metrics(), usual_lr=usual_lr))
            weights_of = event.weights_of
        yield event
        if isinstance(event, Stopped) and event.reason == "interrupted":
            return
    assert verdict is not None
    about = about_training(identity, step=weights_of, steps=steps)
    with world.leading():
        yield from _write(recipe, run, base, plan, verdict, about, resume=resume)


def _write(
    recipe: Recipe,
    run: RunDirectory,
    base: Base,
    plan: Plan | None,
    verdict: Verdict,
    about: dict[str, Any],
    *,
    resume: bool,
) -> Iterator[Event]:
    """Write the results, and say what is written. about: the training, for the adapter's file."""
    if plan is not None and (peaks := planned_and_measured(plan, base.model.device)):
        yield Measured(*peaks)

    if not resume:
        _clear_results(run)
    if recipe.method.method != "full":  # whose adapter would be the merged model again
        adapters.save(base.model, recipe.adapter, tokenizer=base.tokenizer, training=about)
        yield Written("adapter", recipe.adapter, size_of(recipe.adapter))
    yield from _merge(recipe, base, plan, verdict)


def _choose(recipe: Recipe, rows: RunRows, config: PretrainedConfig) -> tuple[Recipe, str | None]:
    """Return the recipe without any choice left, and what was chosen in words.

    Raises ConfigError for settings of evaluation where no rows are held out.
    """
    hidden_size = hidden_size_of(config)
    lengths = lengths_of(rows.examples)
    given = recipe.training
    chosen = choose(given, lengths, what_trains=recipe.what_trains, hidden_size=hidden_size)
    held_out = 0 if rows.ready.eval_data else len(rows.held_out)
    asks = recipe.rows.eval_rows is not None or rows.ready.eval_data
    choices = explain(
        given, chosen, lengths, hidden_size=hidden_size, held_out=None if asks else held_out
    )
    return replace(recipe, training=chosen, rows=replace(recipe.rows, eval_rows=held_out)), choices


def _attach(recipe: Recipe, base: Base) -> None:
    """Attach what the recipe trains, fresh."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # the report says the same
        attach(base.model, recipe.what_trains, seed=recipe.training.seed, tokenizer=base.tokenizer)


def _report(recipe: Recipe, base: Base, dtype: str, new_tokens: tuple[str, ...]) -> Iterator[Event]:
    """Make the rows of new tokens trainable too, and say what trains."""
    report = report_trained(base.model, recipe.what_trains)
    added = new_tokens_of(base.model)
    for rows in added.parameters() if added else ():
        rows.requires_grad_(True)
    yield ModelReady(report, new_tokens, dtype, report_quantized(base.model))
    if report.uncovered:
        yield Notice(report.uncovered)
    yield from map(Notice, report.remarks)


def _check_goes_on(recipe: Recipe, before: Mapping[str, Any], **more: str) -> None:
    """Raise TrainingError where the recipe is no longer that of the run which is to go on.

    more: what is known beside the recipe, of data, base, computed_in; the loop checks the others
    """
    beside = {"data", "base", "computed_in"} - {*more}
    before, now = (
        {name: value for name, value in settings.items() if name not in beside}
        for settings in (before, {**_settings(recipe), **more})
    )
    if not (differing := other_settings(before, now)):
        return
    ways = [
        "name that run's rows" if more else "leave that out",
        "start anew by --force or another --out",
    ]
    names = {text.partition(" ")[0] for text in differing}
    of_adapter = {field.name for kind in (LoRA, Method) for field in fields(kind)}
    if recipe.adapter.exists() and not names & {*of_adapter, "model", "bits"}:
        ways.append(f"start from what it learnt, elsewhere: --from {recipe.adapter} --out OTHER")
    either = "; or ".join(ways)
    raise TrainingError(
        f"The run in {recipe.out} cannot go on so: {joined(differing)}. Either {either}."
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide a run's course, as a checkpoint has them."""
    settings = {k: v for k, v in recipe.settings().items() if k not in ("out", *NOT_OF_THE_COURSE)}
    for name, value in YOUNGER_SETTINGS.items():
        if settings[name] == value:
            del settings[name]
    return json.loads(json.dumps(settings))


def _identity(recipe: Recipe, base: Base, data: str) -> dict[str, Any]:
    """Return all that decides the course of a run: a checkpoint goes on only with the same."""
    return {
        **_settings(recipe),
        "data": data,
        "base": fingerprint(base.model, base.tokenizer),
    }


def _clear_state(run: RunDirectory) -> None:
    """Make way for a new run, once everything about it has proved right."""
    for file in (run.metrics, run.recipe, run.progress):
        file.unlink(missing_ok=True)
    checkpoint.remove_all(run.checkpoints)


def _clear_results(run: RunDirectory) -> None:
    """Remove what an earlier run left as its results, of whatever method, and nothing else."""
    for method in get_args(MethodName):
        for place, markers in (
            (run.adapter(method), (native.config_name(method),)),
            (run.merged(method), merged.MARKERS),
        ):
            if any((place / marker).is_file() for marker in markers):
                shutil.rmtree(place)


def _merge(recipe: Recipe, base: Base, plan: Plan | None, verdict: Verdict) -> Iterator[Event]:
    """Write the merged model, with a certificate, where there can be one, and where the run did not
    diverge, unless that model is all that stays of it."""
    command, device = recipe.merge_command, base.model.device
    why = why_not_mergeable(base.model, command) or why_no_merge(plan, free_on(device), command)
    if verdict.kind == "diverged" and recipe.method.method != "full":
        why = why or f"the run diverged. To make one all the same: {command}"
    if why:
        stale = f"That in {recipe.merged} is of fewer steps. " if recipe.merged.exists() else ""
        yield Notice(f"{stale}No merged model is written: {why}")
        return
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
