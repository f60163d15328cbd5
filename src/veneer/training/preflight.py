"""All that can be wrong with a run and is cheap to check, before its base is loaded."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from veneer.adapter.invocation import tokenized
from veneer.adapter.method import MethodName
from veneer.data.sources import files_of
from veneer.errors import Checks, ConfigError, ModelError, closest
from veneer.files import check_replaceable, check_writable, nearest_existing, size_of
from veneer.formats import adapters, merged, native
from veneer.formats.state import AdapterState
from veneer.models.device import device_of_run, has_memory_of_its_own
from veneer.models.load import dtype_of, load_config_and_tokenizer, skeleton_of
from veneer.models.locate import locate
from veneer.plan.activations import kept_on_disk
from veneer.plan.plan import Plan
from veneer.run_directory import RunDirectory
from veneer.training import checkpoint, start_from
from veneer.training.adamw8bit import check_optimizer
from veneer.training.choose import as_before
from veneer.training.live_teacher import check_teacher
from veneer.training.planned import free_on, plan_run, why_no_merge
from veneer.training.recipe import Recipe
from veneer.training.served_teacher import ServedTeacher
from veneer.training.teacher import check_alone, read_teacher

IN_A_PASS = "what a pass keeps"  # on the disk


@dataclass(frozen=True)
class Preflight:
    """What is known of a run before its base is loaded.

    recipe: with the settings of the adapter that the run starts from, `start`, if it does, and the
    choices of the run that it goes on with; before: all that decided the course of that run. plan:
    the memory, if all rows were as long as allowed. why_no_plan: why there is none.
    """

    recipe: Recipe
    before: Mapping[str, Any]
    start: AdapterState | None
    dtype: torch.dtype
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    plan: Plan | None
    why_no_plan: str = ""

    @property
    def dtype_name(self) -> str:
        """The dtype as settings have it."""
        return str(self.dtype).removeprefix("torch.")


def preflight(
    recipe: Recipe,
    *,
    resume: bool,
    force: bool,
    ignore_space: bool,
    processes: int = 1,
    beside: Preflight | None = None,
) -> Preflight:
    """Check the files, the device, the base's name, the targets against its skeleton, and the disk.

    beside: of another run over the same base, which is not read again.

    Raises what is wrong: one error as it is, several as one ConfigError that lists them.
    """
    run = RunDirectory(recipe.out)
    checks = Checks("This run cannot begin")
    with checks.check():
        check_directory(run, may_hold_a_run=resume or force)
        if resume and not run.path.exists():
            raise ConfigError(
                f"There is no directory {run.path}, so no run to go on with. {_meant(run.path)}"
                "Name the run's directory by --out, or leave out --resume for a new run."
            )
    with checks.check():
        files_of(recipe.data)
    with checks.check():
        if recipe.rows.eval_data:
            files_of(recipe.rows.eval_data, "valid")
    result = None
    with checks.check():
        # What was chosen once stays, and two measurements of what is faster may differ.
        earlier = _earlier_settings(run) if resume else {}
        asked = earlier.get("computed_in", "auto") if recipe.dtype == "auto" else recipe.dtype
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = device_of_run(recipe.device, processes, here=here)
        with checks.check():
            check_optimizer(recipe.training.optimizer, device)
        if asked == "auto" and beside is not None:
            dtype = beside.dtype
        else:
            dtype = dtype_of(locate(recipe.model), asked, device)
        recipe = _as_before(recipe, earlier)
        if beside is None:
            config, tokenizer = load_config_and_tokenizer(recipe.model)
        else:
            config, tokenizer = beside.config, beside.tokenizer
        recipe = replace(recipe, lora=tokenized(recipe.lora, tokenizer))
        start = None
        if recipe.start_from is not None:
            skeleton = skeleton_of(config)
            start = adapters.read(recipe.start_from, skeleton)
            recipe = start_from.settled(recipe, start, skeleton)
        with checks.check():
            if (teacher := recipe.objective.teacher) is not None:
                check_alone(processes)
                if recipe.objective.on_policy:
                    check_teacher(teacher, config, tokenizer)
                elif recipe.objective.teacher_is_served:
                    ServedTeacher.of(recipe.objective, config).check(tokenizer)
                else:
                    read_teacher(teacher, skeleton_of(config))
        with checks.check():
            check_replaceable(recipe.adapter, marker=native.config_name(recipe.method.method))
            check_replaceable(recipe.merged, marker=merged.marker_of(config))
        try:
            on_card = has_memory_of_its_own(device)
            sizes = beside.plan.sizes if beside is not None and beside.plan is not None else None
            plan = plan_run(recipe, dtype, config=config, sizes=sizes, on_card=on_card)
        except ModelError as error:
            result = Preflight(recipe, earlier, start, dtype, config, tokenizer, None, str(error))
        else:
            result = Preflight(recipe, earlier, start, dtype, config, tokenizer, plan)
            if not ignore_space:
                check_space(plan, recipe, device)
    checks.end()
    assert result is not None
    return result


def check_directory(run: RunDirectory, *, may_hold_a_run: bool) -> None:
    """Raise ConfigError where `run` can be no directory, or holds another run that is to stay."""
    if run.path.is_file():
        raise ConfigError(f"{run.path} is a file, but --out must name a directory.")
    above = nearest_existing(run.path)
    if not above.is_dir():
        raise ConfigError(f"{above} is a file; name another place than {run.path} by --out.")
    check_writable(run.path)
    results = [place for m in get_args(MethodName) for place in (run.adapter(m), run.merged(m))]
    earlier = [place.name for place in (*results, run.checkpoints) if place.exists()]
    if earlier and not may_hold_a_run:
        raise ConfigError(
            f"{run.path} holds an earlier run ({', '.join(earlier)}). Go on with it by --resume, "
            "replace it by --force, or name another place by --out."
        )


def _meant(missing: Path) -> str:
    """Return "Did you mean ...? " for the run beside `missing` whose name is most like its."""
    beside = missing.parent.iterdir() if missing.parent.is_dir() else ()
    runs = (place.name for place in beside if RunDirectory(place).checkpoints.is_dir())
    close = closest(missing.name, runs)
    return f"Did you mean {missing.parent / close}? " if close else ""


def bytes_on_disk(
    plan: Plan, recipe: Recipe, device: torch.device, *, merges: bool = True
) -> dict[str, int]:
    """Return what a run needs on the disk, in bytes: its results; its checkpoints, each with the
    weights and Adam's two moments in float32, those that stay and one that is being written; and
    what a pass keeps there."""
    method, width, training = recipe.method, plan.config.width, recipe.training
    checkpoints = training.keep + (training.keep_best or 1) + 1
    if training.epochs and training.steps is None and training.save_every is None:
        checkpoints = min(checkpoints, math.ceil(training.epochs))  # one at the end of each
    bytes_of = {f"{checkpoints} checkpoints": checkpoints * 3 * 4 * plan.trained.count}
    if method.method != "full":
        own_width = width if method.replaces_weights else 4
        bytes_of["the adapter"] = own_width * plan.trained.count
    is_merged = merges and not method.virtual_tokens and not recipe.objective.is_ranking
    if is_merged and why_no_merge(plan, free_on(device)) is None:
        bytes_of["the merged model"] = width * plan.model.parameters
    if kept := kept_on_disk(plan.config, plan.sizes, plan.trained):
        bytes_of[IN_A_PASS] = sum(term.value for term in kept)
    return bytes_of


def free_on_disk(out: Path) -> int:
    """Return the bytes that a run may write below `out`: those that are free, and those of its
    checkpoints, which go. Earlier results stay until the new ones are written."""
    return shutil.disk_usage(nearest_existing(out)).free + size_of(RunDirectory(out).checkpoints)


def check_space(plan: Plan, recipe: Recipe, device: torch.device) -> None:
    """Raise ConfigError where the disk does not hold what stays of a run."""
    bytes_of = bytes_on_disk(plan, recipe, device)
    needed = sum(bytes_of.values())
    free = free_on_disk(recipe.out)
    if needed > free:
        sizes = ", ".join(f"{size / 1e6:,.0f} MB for {what}" for what, size in bytes_of.items())
        raise ConfigError(
            f"{recipe.out} needs {needed / 1e6:,.0f} MB ({sizes}), but the disk has "
            f"{free / 1e6:,.0f} MB. Name another place by --out, or go ahead by --ignore-plan."
        )


def _earlier_settings(run: RunDirectory) -> Mapping[str, Any]:
    """Return all that decided the course of the run that goes on, nothing where there is none."""
    newest = checkpoint.newest(run.checkpoints)
    return {} if newest is None else newest.identity


def _as_before(recipe: Recipe, earlier: Mapping[str, Any]) -> Recipe:
    """Return the recipe with what was chosen for an earlier run, wherever it leaves a choice."""
    rows = recipe.rows
    if rows.eval_rows is None:
        rows = replace(rows, eval_rows=0 if rows.eval_data else earlier.get("eval_rows"))
    return replace(recipe, training=as_before(recipe.training, earlier), rows=rows)
