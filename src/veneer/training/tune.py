"""The main job from end to end: a base and data in, an adapter and a merged model out."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch

from veneer.adapter.attach import attach
from veneer.adapter.certify import certify
from veneer.adapter.merge import merge, why_not_mergeable
from veneer.adapter.method import MethodName
from veneer.adapter.new_tokens import add_tokens, find_new_tokens, new_tokens_of
from veneer.adapter.report import report_quantized, report_trained
from veneer.adapter.virtual_context import context_left
from veneer.data.encode import Encoder, Example, summarize
from veneer.data.load import load_examples
from veneer.data.packing import split_held_out
from veneer.data.preview import preview
from veneer.data.rows import texts_of
from veneer.data.sources import read_rows
from veneer.errors import ConfigError, ModelError, VeneerWarning
from veneer.files import check_replaceable, size_of
from veneer.formats import adapters, merged, native
from veneer.models.fingerprint import fingerprint
from veneer.models.load import Base, dtype_of, load_base
from veneer.models.locate import locate
from veneer.plan.fit import free_bytes
from veneer.run_directory import RunDirectory
from veneer.training import checkpoint
from veneer.training.events import (
    DataReady,
    Event,
    Measured,
    Merged,
    ModelReady,
    Notice,
    Planned,
    Started,
    Stopped,
    Written,
)
from veneer.training.loop import train
from veneer.training.metrics import record
from veneer.training.planned import (
    begin_measuring,
    check_fits,
    measured_peak,
    plan_run,
    room,
    why_no_merge,
)
from veneer.training.recipe import Recipe

# Settings of which the course of the weights does not depend.
BESIDE_THE_POINT = ("out", "save_every", "recompute")
# Settings that came later than checkpoints did, as these have them by not having them.
LATER = {
    "pack_head": False,
    "method": "lora",
    "train_head": False,
    "train_norms": False,
    "dora": False,
    "lora_fa": False,
}


def tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train as the recipe says, write both results below `recipe.out`, and yield what happens.

    `resume` goes on from the newest checkpoint there; `force` replaces an earlier run's results;
    `ignore_plan` goes ahead where the plan needs more memory than there is.
    Raises VeneerError of the kind that fits for anything that cannot be: see each room.
    """
    directory, method = RunDirectory(recipe.out), recipe.method.method
    if recipe.out.is_file():
        raise ConfigError(f"{recipe.out} is a file, but --out must name a directory.")
    if not resume and not force:
        _refuse_to_replace(directory)
    # Once, for two measurements of what is faster may differ.
    dtype = dtype_of(locate(recipe.model), _dtype_of(recipe, resume=resume))
    plan = None
    try:
        plan = plan_run(recipe, dtype)
    except ModelError as error:
        yield Notice(f"No memory is planned for this run: {error}")
    if plan is not None:
        space = room()
        if not ignore_plan:
            check_fits(plan, space, recipe.model)
        yield Planned(plan, space)
    base = load_base(
        recipe.model,
        dtype=_name_of(dtype),
        bits=recipe.bits,
        pack_head=recipe.pack_head,
    )
    check_replaceable(recipe.adapter, marker=native.config_name(method))
    check_replaceable(recipe.merged, marker=merged.marker_of(base.model))
    words = _new_words(recipe, base)
    if words:
        add_tokens(base.model, base.tokenizer, words)
    examples, held_out, ready = _data(recipe, base)
    yield ready
    yield from map(Notice, base.notices)
    if Encoder(base.tokenizer, max_length=recipe.rows.max_length).uses_plain_template:
        yield Notice("The tokenizer has no chat template; turns are written as plain lines.")
    seed = recipe.training.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # the report says the same
        attach(base.model, recipe.what_trains, seed=seed, tokenizer=base.tokenizer)
    report = report_trained(base.model, recipe.what_trains)
    _train_new_rows(base)
    yield ModelReady(report, words, _name_of(dtype), report_quantized(base.model))
    if report.uncovered:
        yield Notice(report.uncovered)

    if not resume:
        _clear(directory)
    begin_measuring()
    events = train(
        base.model,
        examples,
        recipe.training,
        held_out=held_out,
        directory=directory.checkpoints,
        identity={
            "computed_in": _name_of(dtype),
            **_identity(recipe, base, [*examples, *held_out]),
        },
        resume=resume,
        should_stop=should_stop,
    )
    for event in record(events, directory):
        if isinstance(event, Started):  # so the checkpoint, if there is one, belongs to this run
            directory.write_recipe(recipe.settings())
        yield event
        if isinstance(event, Stopped) and event.reason == "interrupted":
            return

    if plan is not None and (peak := measured_peak(plan)):
        yield Measured(plan.memory.peak, peak)
    if not resume:
        _clear_results(directory)
    if method != "full":  # whose adapter would be the merged model again
        told = _told(recipe, base, [*examples, *held_out])
        adapters.save(base.model, recipe.adapter, tokenizer=base.tokenizer, training=told)
        yield Written("adapter", recipe.adapter, size_of(recipe.adapter))
    why = why_not_mergeable(base.model) or (plan and why_no_merge(plan, free_bytes()))
    if why:
        yield Notice(f"No merged model is written: {why}")
        return
    plain = merge(base.model)
    if method == "lora":  # all other weights are taken as they are
        certificate = certify(base.model, plain, base.tokenizer)
        yield Merged(certificate)
        if problems := certificate.problems():
            # No reason to fail: the run's result is the adapter, and that is kept.
            yield Notice(
                f"The merged model is not what was learnt: {'; '.join(problems)}. The adapter "
                "itself holds all of it; use that, or veneer merge --dtype float32."
            )
    merged.write_model(plain, base.tokenizer, recipe.merged)
    yield Written("merged model", recipe.merged, size_of(recipe.merged))


def _refuse_to_replace(run: RunDirectory) -> None:
    results = [place for m in get_args(MethodName) for place in (run.adapter(m), run.merged(m))]
    earlier = [place.name for place in (*results, run.checkpoints) if place.exists()]
    if earlier:
        raise ConfigError(
            f"{run.path} holds an earlier run ({', '.join(earlier)}). Go on with it by --resume, "
            "replace it by --force, or name another place by --out."
        )


def _dtype_of(recipe: Recipe, *, resume: bool) -> str:
    """Return the dtype to load in: a run that goes on keeps the one that `auto` chose for it."""
    found = checkpoint.newest(RunDirectory(recipe.out).checkpoints) if resume else None
    if found is None or recipe.dtype != "auto":
        return recipe.dtype
    return str(found.progress["identity"]["computed_in"])


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _clear(run: RunDirectory) -> None:
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


def _data(recipe: Recipe, base: Base) -> tuple[list[Example], list[Example], DataReady]:
    rows, tokenizer = recipe.rows, base.tokenizer
    # A model may have no position beyond its context at all.
    context = context_left(base.model, recipe.method.virtual_tokens or 0)
    max_length = min(rows.max_length, context or rows.max_length)
    examples, skipped = load_examples(
        recipe.data,
        tokenizer,
        max_length=max_length,
        limit=rows.limit,
        skip_bad_rows=rows.skip_bad_rows,
    )
    held_out: list[Example] = []
    if rows.eval_data is not None:
        held_out, more = load_examples(
            rows.eval_data,
            tokenizer,
            max_length=max_length,
            skip_bad_rows=rows.skip_bad_rows,
        )
        skipped += more
    elif rows.eval_rows:
        training, aside = split_held_out(
            len(examples), eval_rows=rows.eval_rows, seed=recipe.training.seed
        )
        held_out = [examples[i] for i in aside]
        examples = [examples[i] for i in training]
    held_out_summary = summarize(held_out) if held_out else None
    shown = preview(examples[0], tokenizer)
    return examples, held_out, DataReady(summarize(examples), held_out_summary, skipped, shown)


def _new_words(recipe: Recipe, base: Base) -> tuple[str, ...]:
    asked = recipe.rows.new_words
    if not asked:
        return ()
    if asked != "auto":
        return tuple(word.strip() for word in asked.split(",") if word.strip())
    rows, _ = read_rows(recipe.data, limit=recipe.rows.limit)
    texts = (text for row in rows for text in texts_of(row))
    return tuple(find_new_tokens(texts, base.tokenizer))


def _train_new_rows(base: Base) -> None:
    words = new_tokens_of(base.model)
    for rows in words.parameters() if words else ():
        rows.requires_grad_(True)


def _told(recipe: Recipe, base: Base, examples: list[Example]) -> dict[str, Any]:
    """Return what an adapter says of its training: a hash of the data, and the settings without the
    places on this machine."""
    identity = _identity(recipe, base, examples)
    places = {"data", "eval_data", "base", "model"}
    settings = {name: value for name, value in identity.items() if name not in places}
    return {"data": identity["data"], "recipe": settings}


def _identity(recipe: Recipe, base: Base, examples: list[Example]) -> dict[str, Any]:
    tokens = [(row.tokens, row.labels) for row in examples]
    settings = {k: v for k, v in recipe.settings().items() if k not in BESIDE_THE_POINT}
    for name, usual in LATER.items():
        if settings[name] == usual:
            del settings[name]
    identity = {
        **settings,
        "data": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
        "base": fingerprint(base.model, base.tokenizer),
    }
    return json.loads(json.dumps(identity))
