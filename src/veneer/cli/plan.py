"""The flags of `veneer plan`."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from veneer.adapter.config import LoRA
from veneer.cli.flags import Flat, Switch
from veneer.errors import ConfigError
from veneer.plan.config import PlanConfig


def plan(
    model: Annotated[
        str,
        Parameter(
            help="Preset (llama-2-70b, ...), config.json, directory that has one, or .gguf file."
        ),
    ],
    /,
    *,
    lora: Annotated[LoRA, Flat] = LoRA(),
    settings: Annotated[PlanConfig, Flat] = PlanConfig(),
    tokens: Annotated[int | None, Parameter(help="Short for --tokens-per-batch.")] = None,
    formulas: Annotated[Switch, Parameter(help="Show the formula of each line of memory.")] = False,
) -> None:
    """Complete the settings, then print the plan."""
    if tokens is not None:
        if settings.tokens_per_batch != PlanConfig().tokens_per_batch:
            raise ConfigError("--tokens is short for --tokens-per-batch; give one of them.")
        settings = replace(settings, tokens_per_batch=tokens)
    # The imports make millions of objects and no garbage: collecting takes a fifth of the time.
    gc.disable()
    try:
        from veneer.cli.plan_tables import show_plan

        show_plan(model, lora, settings, formulas=formulas)
    finally:
        gc.enable()
