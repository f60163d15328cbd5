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
from veneer.plan.hardware import bytes_of, devices_of, link_of


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
    devices: Annotated[
        str | None,
        Parameter(
            help="Devices to share the run, as 8x24GB (8 with 24 GB each): what of the base each "
            "holds, and what it sends."
        ),
    ] = None,
    link: Annotated[
        str | None,
        Parameter(help="With --devices, what a device sends in a second, as 10GB/s."),
    ] = None,
    formulas: Annotated[Switch, Parameter(help="Show the formula of each line of memory.")] = False,
) -> None:
    """Complete the settings, then print the plan."""
    if tokens is not None:
        if settings.tokens_per_batch != PlanConfig().tokens_per_batch:
            raise ConfigError("--tokens is short for --tokens-per-batch; give one of them.")
        settings = replace(settings, tokens_per_batch=tokens)
    if memory is not None and devices is not None:
        raise ConfigError("--devices says what memory each has; leave out --memory.")
    if link is not None and devices is None:
        raise ConfigError("--link is of what devices send; give --devices too, as 8x24GB.")
    size = None if memory is None else bytes_of(memory)
    shared = None if devices is None else devices_of(devices)
    rate = None if link is None else link_of(link)
    # The imports make millions of objects and no garbage: collecting takes a fifth of the time.
    gc.disable()
    try:
        if shared is not None:
            from veneer.cli.device_tables import show_devices

            show_devices(model, lora, settings, shared, link=rate, formulas=formulas)
            return
        from veneer.cli.plan_tables import show_plan

        show_plan(model, lora, settings, memory=size, formulas=formulas)
    finally:
        gc.enable()
