"""A training run's memory: planned before the base is loaded, and measured at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from veneer.errors import ConfigError
from veneer.generate.runners.compiled import tokens_held
from veneer.generate.samples import rows_drawn
from veneer.machine import free_bytes
from veneer.models.device import free_memory, has_memory_of_its_own, peak_memory
from veneer.models.load import load_config
from veneer.plan.config import MethodName as PlannedMethod
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_config, sizes_of
from veneer.plan.fit import flags, gentlest
from veneer.plan.memory import GROWTH, RUNTIME
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import Plan, make_plan
from veneer.plan.presets import PRESETS
from veneer.plan.sizes import Sizes
from veneer.plan.stored import stored_of
from veneer.quant.settings import Bits
from veneer.training.memory import process_memory
from veneer.training.recipe import Recipe


def plan_run(
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    config: PretrainedConfig | None = None,
    sizes: Sizes | None = None,
    on_card: bool = False,
) -> Plan:
    """Return the plan of a run that computes in `dtype`, on the processor or on a card, with rows
    as long as the recipe and the model's context allow.

    config, sizes: the model's, which are read and made unless given.

    Raises ModelError for what is no causal language model, and TargetError for targets that match
    nothing.
    """
    name, training = recipe.model, recipe.training
    if training.tokens_per_step is None:
        training = replace(training, tokens_per_step=PlanConfig.tokens_per_batch)
    bits: Bits | None = recipe.quantized_bits
    head, mapped = recipe.pack_head, False
    preset = name in PRESETS and not Path(name).exists()
    if config is None:
        config = find_config(name) if preset else load_config(name)
    stored, method = stored_of(name, config), recipe.method
    sizes = sizes or replace(sizes_of(config), stored=stored)
    if stored is not None and (recipe.loaded_bits is None or not stored.format):
        bits, head, mapped = stored.bits, stored.head, True
    settings = PlanConfig(
        method=_planned_method(recipe, bits),
        bits=bits,
        dtype="float32" if dtype == torch.float32 else "bf16",
        pack_head=head,
        tokens_per_batch=training.batch_tokens,
        max_length=min(recipe.rows.max_length, sizes.context or recipe.rows.max_length)
        * recipe.objective.rows_of_an_example,
        recompute=training.recompute,
        optimizer=training.optimizer,
        mapped=mapped,
        offload=recipe.offload,
        trained_blocks=method.trained_blocks or PlanConfig.trained_blocks,
        train_head=method.train_head,
        train_norms=method.train_norms,
        virtual_tokens=method.virtual_tokens or PlanConfig.virtual_tokens,
        prefix_mlp=method.prefix_mlp,
    )
    adapted = adapted_layers(sizes, recipe.lora) if method.method == "lora" else ()
    return make_plan(settings, sizes, adapted, runtime=_runtime(on_card), on_card=on_card)


def with_rows(plan: Plan, recipe: Recipe, longest: int, *, teacher: int = 0) -> Plan:
    """Return the plan with the tokens of a pass that were chosen for rows of up to `longest`, and
    with the bytes of a teacher that is there meanwhile."""
    tokens = recipe.training.batch_tokens
    config = replace(plan.config, tokens_per_batch=tokens, max_length=longest)
    drawn = 0
    if recipe.objective.shape == "prompts":
        policy = recipe.on_policy
        rows = max(rows_drawn(policy.group_size), policy.eval_answers)
        drawn = rows * tokens_held(longest)
    return make_plan(
        *(config, plan.sizes, plan.adapted),
        runtime=_runtime(plan.on_card),
        on_card=plan.on_card,
        drawn=drawn,
        teacher=teacher,
    )


def _runtime(on_card: bool) -> int | None:
    if on_card:
        return None
    # A program that calls this may hold more than the libraries.
    return max(RUNTIME, process_memory("VmRSS") + GROWTH)


def _planned_method(recipe: Recipe, bits: Bits | None) -> PlannedMethod:
    if recipe.method.method != "lora":
        return recipe.method.method
    if recipe.lora.dora:
        return "dora"
    return "qlora" if bits else "lora"


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process has and may still take for what it computes on a device,
    None where they are not known."""
    free = free_on(device)
    if free is None or has_memory_of_its_own(device):
        return free
    return free + process_memory("VmRSS")


def free_on(device: torch.device) -> int | None:
    """Return the bytes that this process may still take there, None where they are not known."""
    return free_memory(device) if has_memory_of_its_own(device) else free_bytes()


def check_fits(plan: Plan, available: int | None, model: str) -> None:
    """Raise ConfigError, with what would make it fit, where a plan needs more memory than is there.

    available: what the process has and may still take, in bytes, None for not known.
    """
    if available is None or plan.memory.peak <= available:
        return
    needed = (
        f"This run would need {_gb(plan.memory.peak)} at its peak, but there is {_gb(available)}"
    )
    better = gentlest(plan, available)
    if better is None:
        raise ConfigError(
            f"{needed}, and no settings make it fit. Take a smaller model, or override this with "
            "--ignore-plan."
        )
    proposal = flags(plan.config, better.config)
    if better.config.mapped and not plan.config.mapped:
        rest = proposal.replace(f"--bits {better.config.bits}", "").replace("--mapped", "").split()
        proposal = (
            f"veneer quantize {model} QUANTIZED --bits {better.config.bits}"
            f"{' --pack-head' if better.config.pack_head else ''}, and then, without --bits, "
            f"{' '.join(['veneer tune QUANTIZED ...', *rest])}"
        )
    raise ConfigError(
        f"{needed}. It would fit, with {_gb(better.memory.peak)}, by: {proposal}. "
        "To go ahead all the same: --ignore-plan."
    )


def check_host(plan: Plan, processes: int) -> None:
    """Raise ConfigError where this machine's memory does not hold what offloading leaves there for
    each of its processes."""
    free, needed = free_bytes(), processes * plan.memory.on_host.value
    if free is not None and needed > free:
        raise ConfigError(
            f"--offload cpu would keep {_gb(needed)} of the base in this machine's memory, but "
            f"there is {_gb(free)}. Take --offload disk, or fewer --bits. To go ahead all the "
            "same: --ignore-plan."
        )


def planned_and_measured(plan: Plan, device: torch.device) -> tuple[int, int] | None:
    """Return the peak that was planned, and the most memory that was taken since `begin_measuring`,
    None where it is not known. Of a card both are of tensors alone.

    On a processor it is not known where the base or what passes keep is mapped: these pages count
    as resident, and are not planned.
    """
    if plan.on_card:
        peak = peak_memory(device)
        return None if peak is None else (plan.memory.peak - plan.runtime, peak)
    is_mapped = plan.config.mapped or plan.memory.on_disk.value
    peak = 0 if is_mapped else process_memory("VmHWM")
    return (plan.memory.peak, peak) if peak else None


def why_no_merge(plan: Plan | None, free: int | None, command: str = "veneer merge") -> str | None:
    """Return why a quantized base cannot be merged in `free` bytes; None where it can, or where
    nothing is planned.

    command: by which it can be where there are more.
    """
    if plan is None or plan.config.base_bits >= 16 or free is None:
        return None
    needed = plan.model.parameters * plan.config.width  # all of it dequantized
    if needed <= free:
        return None
    how = f"on the processor: {command} --device cpu"
    if not plan.on_card:
        how = f"on a machine with more memory: {command}"
    return f"dequantized, it needs {_gb(needed)}, and {_gb(free)} are free. To make one, {how}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
