"""The flags of `veneer plan`."""

from __future__ import annotations

import gc
import re
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
        Parameter(help="Preset (qwen3-8b, ...), config.json, directory, .gguf file, or hub name."),
    ],
    /,
    *,
    lora: Annotated[LoRA, Flat] = LoRA(),
    settings: Annotated[PlanConfig, Flat] = PlanConfig(),
    tokens: Annotated[int | None, Parameter(help="Short for --tokens-per-batch.")] = None,
    memory: Annotated[
        str | None,
        Parameter(help="Memory of another machine, as 24GB or 80GiB, to plan for instead of this."),
    ] = None,
    formulas: Annotated[Switch, Parameter(help="Show the formula of each line of memory.")] = False,
) -> None:
    """Complete the settings, then print the plan."""
    if tokens is not None:
        if settings.tokens_per_batch != PlanConfig().tokens_per_batch:
            raise ConfigError("--tokens is short for --tokens-per-batch; give one of them.")
        settings = replace(settings, tokens_per_batch=tokens)
    size = None if memory is None else bytes_of(memory)
    # The imports make millions of objects and no garbage: collecting takes a fifth of the time.
    gc.disable()
    try:
        from veneer.cli.plan_tables import show_plan

        show_plan(model, lora, settings, memory=size, formulas=formulas)
    finally:
        gc.enable()


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as 24GB (powers of 1000) or 80GiB (powers of 1024).

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *([kmgt])(i?)b?", size.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"--memory is {size!r}, but must be a size such as 24GB or 80GiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "kmgt".index(match[2])))
