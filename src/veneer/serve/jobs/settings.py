"""From what a client asks to the recipe of a run, which is `tune`'s own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from veneer.adapter.config import LoRA
from veneer.errors import ConfigError
from veneer.objectives.config import ON_POLICY, Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.quant.settings import LoadBits
from veneer.rewards.graders import grader_of
from veneer.rewards.named import GRADER
from veneer.run_directory import RunDirectory
from veneer.serve.jobs.values import WorkerFiles
from veneer.training.config import TOKENS_PER_PASS, TrainConfig
from veneer.training.recipe import DataConfig, DType, Recipe

AUTO = "auto"
HYPERPARAMETERS = ("n_epochs", "learning_rate_multiplier", "batch_size")
METHODS = ("supervised", "dpo", "reinforcement")
# Settings of a run that OpenAI has a parameter for, or that are the server's to decide.
_NOT_OWN = {"seed", "context_parallel", "eval_data"}
# A teacher is a directory of the server's, or an address that it would ask; clients name neither.
_NOT_OWN |= {"teacher", "teacher_model", "divergence", "teacher_top_k", "distill_temperature"}
_NOT_OWN |= {"on_policy", "jsd_beta"}
_NOT_OWN |= {"reward", "reward_weights", "reward_seconds"}  # files here, and code: graders are none
# What a client may ask of the samples of a step, each of which takes memory and time.
MOST_OF_SAMPLES = {
    "group_size": 64,
    "prompts_per_step": 256,
    "max_new_tokens": 4096,
    "updates": 16,
    "resample": 16,
    "eval_answers": 64,
}
# What OpenAI calls settings of evaluation on samples, by the names that they have here.
OF_EVALUATION = {"eval_interval": "eval_every", "eval_samples": "eval_answers"}
GROUPS: dict[str, type] = {
    "lora": LoRA,
    "training": TrainConfig,
    "objective": Objective,
    "on_policy": OnPolicy,
    "rows": DataConfig,
}
# Each setting that a client may give beside OpenAI's parameters, by the group that it is of.
OWN = {
    field.name: group
    for group, config in GROUPS.items()
    for field in fields(config)
    if field.name not in _NOT_OWN
}


@dataclass(frozen=True)
class TrainingBase:
    """The base of all jobs, loaded as the server has it."""

    name: str
    dtype: DType = "auto"
    bits: LoadBits | None = None
    pack_head: bool = False
    device: str = "auto"


def settings_of(
    base: TrainingBase,
    *,
    data: Path,
    valid: Path | None,
    out: Path,
    start_from: Path | None,
    seed: int,
    hyperparameters: Mapping[str, Any],
    own: Mapping[str, Any],
    grader: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a job's settings as plain values for JSON, and check them.

    grader: what judges the samples of a job that learns from them, as OpenAI has it. Raises
    ConfigError for settings that cannot be, or that say one thing twice.
    """
    epochs, multiplier, batch = (_given(hyperparameters.get(name)) for name in HYPERPARAMETERS)
    compute = _given(hyperparameters.get("compute_multiplier"))
    evaluating = {
        own_name: value
        for name, own_name in OF_EVALUATION.items()
        if valid is not None and (value := _given(hyperparameters.get(name))) is not None
    }
    size = "tokens_per_step" if grader is None else "prompts_per_step"
    twice = {
        "n_epochs and epochs or steps": epochs and (own.get("epochs") or own.get("steps")),
        "learning_rate_multiplier and lr": multiplier and own.get("lr"),
        f"batch_size and {size}": batch and own.get(size),
        "compute_multiplier and group_size": compute and own.get("group_size"),
    } | {
        f"{name} and {own_name}": own_name in evaluating and own.get(own_name)
        for name, own_name in OF_EVALUATION.items()
    }
    if problems := [names for names, given in twice.items() if given]:
        raise ConfigError(f"Of {', '.join(problems)}, give one: they say the same thing.")
    if grader is not None:
        grader_of(grader)
        own = {**own, **({"prompts_per_step": batch} if batch else {})}
        own |= {"group_size": group_size(compute)} if compute else {}
        own |= evaluating
        batch = None
        _check_samples(own)
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in own.items():
        groups[OWN[name]][name] = value
    if start_from is not None and Objective(**groups["objective"]).has_reference:
        groups["objective"].setdefault("reference", "start")  # the model that was named
    groups["training"] |= {"seed": seed} | ({"epochs": float(epochs)} if epochs else {})
    if valid is not None:
        groups["rows"]["eval_data"] = str(valid)
    settings = {
        "model": base.name,
        "data": str(data),
        "out": str(out),
        "start_from": start_from and str(start_from),
        "dtype": base.dtype,
        "bits": base.bits,
        "pack_head": base.pack_head,
        "device": base.device,
        "learning_rate_multiplier": multiplier,
        "batch_size": batch,
        "grader": grader,
        **groups,
    }
    recipe_of(settings)
    return settings


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe, without what needs the rows. Raises ConfigError."""
    rows = dict(settings["rows"])
    if "eval_data" in rows:
        rows["eval_data"] = Path(rows["eval_data"])
    place = WorkerFiles(Path(settings["out"])).grader
    rewards = (f"{GRADER}:{place}",) if settings.get("grader") else ()
    return Recipe(
        model=settings["model"],
        data=settings["data"],
        lora=LoRA(**settings["lora"]),
        training=TrainConfig(**settings["training"]),
        # Jobs of earlier versions have no such groups.
        objective=Objective(**settings.get("objective", {})),
        on_policy=OnPolicy(reward=rewards, **settings.get("on_policy", {})),
        rows=DataConfig(**rows),
        dtype=settings["dtype"],
        bits=settings["bits"],
        pack_head=settings["pack_head"],
        device=settings["device"],
        out=Path(settings["out"]),
        start_from=Path(settings["start_from"]) if settings["start_from"] else None,
    )


def method_of(settings: Mapping[str, Any]) -> str:
    """Return by which of OpenAI's METHODS a job learns."""
    objective = settings.get("objective", {}).get("objective", "sft")
    if objective in ON_POLICY:
        return "reinforcement"
    return "supervised" if objective == "sft" else "dpo"


def group_size(compute_multiplier: float) -> int:
    """Return how many answers are drawn to each prompt, as a multiple of how many usually are."""
    return max(2, round(OnPolicy().group_size * compute_multiplier))


def _check_samples(own: Mapping[str, Any]) -> None:
    """Raise ConfigError for more samples at once than a job may draw."""
    over = [
        f"{name} is {own[name]:,}, and may be {most:,}"
        for name, most in MOST_OF_SAMPLES.items()
        if (own.get(name) or 0) > most
    ]
    if over:
        raise ConfigError(f"A job may not draw so many samples: {'; '.join(over)}.")


def sharing_of(settings: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what must be equal for jobs to train in passes that they share, None for a job that
    trains by itself: it cannot share any, as it draws samples or has new tokens, or its steps are
    so large that none has a place beside them and all would only wait for each other."""
    training = settings["training"]
    is_large = (training.get("tokens_per_step") or 0) > TOKENS_PER_PASS // 2
    is_other = settings["rows"].get("new_words") or method_of(settings) == "reinforcement"
    if is_other or training.get("replay_passes") or is_large:
        return None
    base = (settings[name] for name in ("model", "dtype", "bits", "pack_head", "device"))
    return (*base, training.get("recompute"))


def settled(settings: Mapping[str, Any], *, resume: bool) -> Recipe:
    """Return the recipe with the rate and the tokens of a step that OpenAI's two other parameters
    ask for: a multiple of the usual rate, and as many tokens as that many rows have in the mean.

    Raises what `preflight` and reading the rows raise.
    """
    recipe = recipe_of(settings)
    multiplier, batch = settings["learning_rate_multiplier"], settings["batch_size"]
    if multiplier is None and batch is None:
        return recipe
    training = recipe.training
    earlier = RunDirectory(recipe.out).read_recipe() if resume else {}
    if not {"lr", "tokens_per_step"} <= {*earlier}:
        earlier = _of_rows(recipe, multiplier, batch, resume=resume)
    if multiplier is not None:
        training = replace(training, lr=earlier["lr"])
    if batch is not None:
        training = replace(training, tokens_per_step=earlier["tokens_per_step"])
    return replace(recipe, training=training)


def _of_rows(
    recipe: Recipe, multiplier: float | None, batch: int | None, *, resume: bool
) -> dict[str, Any]:
    """Return the rate, and the tokens of a step, None where they are not asked for."""
    # Here, for they import torch.
    from veneer.data.columns import lengths_of
    from veneer.training.choose import usual_rate
    from veneer.training.preflight import preflight
    from veneer.training.rows import load_rows

    ahead = preflight(recipe, resume=resume, force=False, ignore_space=False)
    chosen: dict[str, Any] = {"lr": None, "tokens_per_step": None}
    if multiplier is not None:
        chosen["lr"] = usual_rate(ahead.recipe, ahead.config) * multiplier
    if batch is not None:
        loading = load_rows(ahead.recipe, ahead.config, ahead.tokenizer)
        while True:
            try:
                next(loading)
            except StopIteration as ended:
                lengths = lengths_of(ended.value.examples)
                break
        chosen["tokens_per_step"] = max(1, round(batch * sum(map(int, lengths)) / len(lengths)))
    return chosen


def _given(value: Any) -> Any:
    return None if value in (None, AUTO) else value
