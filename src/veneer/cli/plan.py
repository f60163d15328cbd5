"""`veneer plan`: parameters and memory of any model and method, before anything is loaded."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.adapter.config import LoRA
from veneer.cli.console import bytes_text
from veneer.cli.flags import Flat, Switch
from veneer.errors import ConfigError
from veneer.plan.config import ADAPTING, PlanConfig
from veneer.plan.find import find_config
from veneer.plan.fit import flags, free_bytes, gentlest
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import Plan, comparison, make_plan
from veneer.plan.shapes import ModelShape, Part, shape_of
from veneer.quant.settings import quantization_of

# Columns of the output, whatever the terminal's: in fewer, numbers would be cut off or broken.
WIDTH = 100


def plan(
    model: Annotated[
        str, Parameter(help="Preset (llama-2-70b, ...), config.json, or directory that has one.")
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
    show_plan(model, lora, settings, formulas=formulas)


def show_plan(model: str, lora: LoRA, config: PlanConfig, *, formulas: bool) -> None:
    """Print the plan of training `model`, beside other methods and what is free here."""
    found = find_config(model)
    shape, packed = shape_of(found), quantization_of(found)
    if packed and config.bits is None and config.method in ("lora", "qlora"):
        # As it stands on the disk.
        config = replace(
            config, method="qlora", bits=packed.bits, pack_head=packed.head, mapped=True
        )
    plan, free = make_plan(config, shape, adapted_layers(shape, lora)), free_bytes()
    output = Console(highlight=False, width=WIDTH)
    output.print(f"[bold]{escape(model)}[/]  {description(shape)}\n")
    output.print(parts_table(plan))
    output.print(f"{trained_text(plan)}\n")
    output.print(methods_table(plan, free))
    output.print()
    output.print(memory_table(plan, formulas=formulas))
    for line in (*notes(plan), verdict(plan, free)):
        output.print(line)


def description(shape: ModelShape) -> str:
    """Return a model's widths in one line."""
    heads = f"{shape.heads} heads"
    if shape.kv_heads != shape.heads:
        heads += f" over {shape.kv_heads} of keys and values"
    return (
        f"{shape.model_type}, {shape.depth} blocks, dim {shape.dim:,}, {heads}, "
        f"feed-forward {shape.inner:,}, {shape.words:,} words"
    )


def trained_text(plan: Plan) -> str:
    """Return one line: how many parameters train, and what part that is."""
    return (
        f"{plan.config.method}: {plan.trained.count:,} of {plan.shape.parameters:,} parameters "
        f"train ({plan.share:.3%})"
    )


def parts_table(plan: Plan) -> Table:
    """Return the layers with parameters; blocks whose layers have the same shapes share a line."""
    adapted = {each.part.path: each.rank for each in plan.trained.adapted}
    own = {part.path for part in plan.trained.weights}
    magnitudes = plan.config.method == "dora"
    alike: dict[tuple[object, ...], list[Part]] = defaultdict(list)
    for part in plan.shape.parts:
        inner = re.sub(r"^.*?\.\d+\.", "", part.path)
        alike[inner, part.shape, part.bias, adapted.get(part.path), part.path in own].append(part)
    table = _table("Part (in its block)", "Times", "Weight", "Each", "All", "Trained", "Per cent")
    for (name, _, _, rank, trains), parts in alike.items():
        first = parts[0]
        trained = first.parameters if trains else 0
        if isinstance(rank, int):
            trained = rank * (first.out + first.in_) + (first.out if magnitudes else 0)
        weight = f"{first.out:,}" if first.kind == "norm" else f"{first.out:,} × {first.in_:,}"
        table.add_row(
            escape(str(name)) + (" (tied)" if first.tied else ""),
            f"{len(parts)}",
            weight + (" + bias" if first.bias else ""),
            f"{first.parameters:,}",
            f"{first.parameters * len(parts):,}",
            f"{trained * len(parts):,}" if trained else "",
            f"{trained / (first.out * first.in_):.2%}" if trained else "",
        )
    total = f"{plan.shape.parameters:,}"
    count = f"{plan.trained.count:,}"
    table.add_section()
    table.add_row("total", "", "", "", total, count, f"{plan.share:.3%}", style="bold")
    return table


def methods_table(plan: Plan, free: int | None) -> Table:
    """Return what each method would train and need, with the plan's other settings."""
    table = _table(
        "Method", "Trained", "Per cent", "Weights", "Gradients", "Adam", "Kept", "Peak", "Fits"
    )
    for title, one in comparison(plan):
        memory = one.memory
        amounts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        fits = "" if free is None else "yes" if memory.peak <= free else "no"
        table.add_row(
            title,
            f"{one.trained.count:,}",
            f"{one.share:.3%}",
            *(bytes_text(amount.value) for amount in amounts),
            bytes_text(memory.peak),
            fits,
            style="bold" if title == plan.config.method else None,
        )
    return table


def memory_table(plan: Plan, *, formulas: bool) -> Table:
    """Return the plan's memory line by line, with each line's formula if asked for."""
    config = plan.config
    table = _table(f"Memory of {config.method}, {config.tokens_per_batch:,} tokens", "Bytes")
    if formulas:
        table.add_column("= sum of", overflow="fold")
    for amount in plan.memory.amounts:
        row = [amount.name, bytes_text(amount.value)]
        table.add_row(*row, *([amount.formula] if formulas else []))
    table.add_section()
    table.add_row("peak", bytes_text(plan.memory.peak), style="bold")
    if plan.memory.on_disk.value:
        amount = plan.memory.on_disk
        row = [amount.name, bytes_text(amount.value)]
        table.add_row(*row, *([amount.formula] if formulas else []), style="dim")
    return table


def notes(plan: Plan) -> list[str]:
    """Return why the numbers are smaller than those that are often quoted."""
    shape = plan.shape
    under = [each for each in plan.trained.adapted if each.part.name in ("k_proj", "v_proj")]
    if shape.kv == shape.q or not under or plan.config.method not in ADAPTING:
        return []
    square = plan.trained.count + sum(x.rank * (shape.q - x.part.out) for x in under)
    return [
        f"[dim]Grouped-query attention: k and v are {shape.dim:,} → {shape.kv:,}, not → "
        f"{shape.q:,}. With as many heads of keys and values as of queries, these adapters would "
        f"have {square:,} parameters instead of {plan.trained.count:,}.[/]"
    ]


def verdict(plan: Plan, free: int | None) -> str:
    """Return whether the plan fits this machine and, if not, what would make it fit."""
    peak = bytes_text(plan.memory.peak)
    if free is None:
        return f"Peak {peak}; how much is free here, this system does not say."
    here = f"Peak {peak}; {bytes_text(free)} are free here"
    if plan.memory.peak <= free:
        return f"[green]{here}: it fits.[/]"
    better = gentlest(plan, free)
    if better is None:
        return f"[red]{here}: it does not fit, whatever its settings.[/]"
    disk = better.memory.on_disk.value
    mapped = f", and {bytes_text(disk)} on the disk that veneer quantize wrote" if disk else ""
    return (
        f"[yellow]{here}: it does not fit.[/] With [bold]{flags(plan.config, better.config)}[/] it "
        f"would: {bytes_text(better.memory.peak)}{mapped}."
    )


def _table(first: str, *others: str) -> Table:
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
