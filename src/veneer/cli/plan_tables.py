"""What `veneer plan` prints: parameters and memory of any model and method, and what fits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from veneer.adapter.config import LoRA
from veneer.adapter.report import remarks
from veneer.adapter.targets import uncovered
from veneer.cli.console import bytes_text, new_table, page, print_narrow, quieten_libraries
from veneer.machine import free_bytes
from veneer.models.description import Layer
from veneer.plan.activations import recompute_of
from veneer.plan.config import ADAPTING, PlanConfig
from veneer.plan.find import find_config, sizes_of
from veneer.plan.fit import MARGIN, flags, gentlest
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import Plan, comparison, make_plan, unsuited
from veneer.plan.sizes import Sizes
from veneer.plan.stored import stored_of

# Columns of the output, unless the terminal has fewer: there some of the tables' are left out.
WIDTH = 100


def show_plan(
    model: str, lora: LoRA, config: PlanConfig, *, memory: int | None = None, formulas: bool
) -> None:
    """Print the plan of training `model`, beside other methods and what is free.

    memory: the bytes of another machine, to judge by instead of what is free here.
    """
    quieten_libraries()
    plan = planned(model, lora, config)
    free = free_bytes() if memory is None else memory
    output = page(WIDTH)
    output.print(f"[bold]{escape(model)}[/]  {summary(plan.sizes)}\n")
    print_narrow(layers_table(plan), "Each", "Times", on=output)
    output.print(f"{trained_text(plan)}\n")
    print_narrow(methods_table(plan, free), "Per cent", "Gradients", on=output)
    output.print()
    output.print(memory_table(plan, formulas=formulas))
    missing = uncovered(plan.model.model, lora) if config.method in ADAPTING else None
    if missing:
        output.print(f"[yellow]{escape(missing)}[/]")
    for remark in remarks(plan.share, plan.trained.adapted):
        output.print(f"[yellow]{escape(remark)}[/]")
    for line in (*notes(plan), verdict(plan, free, elsewhere=memory is not None)):
        output.print(line)


def planned(model: str, lora: LoRA, config: PlanConfig, *, on_card: bool = False) -> Plan:
    """Return the plan of training `model`, over its files as they are where those are quantized."""
    settings = find_config(model)
    sizes, stored = sizes_of(settings), stored_of(model, settings)
    if stored:
        sizes = replace(sizes, stored=stored)
    if stored and config.bits is None and config.method not in ("full", "freeze"):
        # As it is on the disk.
        config = replace(
            config,
            method="qlora" if config.method == "lora" else config.method,
            bits=stored.bits,
            pack_head=stored.head,
            mapped=True,
        )
    return make_plan(config, sizes, adapted_layers(sizes, lora), on_card=on_card)


def summary(sizes: Sizes) -> str:
    """Return a model's widths in one line."""
    heads = f"{sizes.heads} heads"
    if latent := getattr(sizes.config, "kv_lora_rank", None):
        heads += f" over a latent of {latent:,}"
    elif sizes.kv not in (0, sizes.q):
        heads += f" over {sizes.kv // max(1, sizes.head_dim)} of keys and values"
    return (
        f"{sizes.config.model_type}, {sizes.description.depth} blocks, dim {sizes.dim:,}, "
        f"{heads}, feed-forward {feed_forward(sizes)}, {sizes.vocab:,} tokens"
    )


def feed_forward(sizes: Sizes) -> str:
    """Return "3,072", or "32 experts of 2,880 (4 active)", with the blocks where they differ."""
    mixed = [block for block in sizes.blocks if block.routed]
    dense = [block.dense for block in sizes.blocks if not block.routed and block.dense]
    texts = [f"{max(dense):,}{f' in {len(dense)} blocks' if mixed else ''}"] if dense else []
    if mixed:
        widest = max(mixed, key=lambda block: block.routed)
        shared = f" and {widest.dense:,} shared" if widest.dense else ""
        texts.append(
            f"{widest.expert_count} experts of {widest.expert_width:,} ({widest.experts} active)"
            f"{shared}{f' in {len(mixed)} blocks' if dense else ''}"
        )
    return ", ".join(texts) or "0"


def trained_text(plan: Plan) -> str:
    """Return one line: how many parameters train, and what share that is."""
    return (
        f"{plan.config.method}: {plan.trained.count:,} of {plan.model.parameters:,} parameters "
        f"train ({plan.share:.3%})"
    )


def layers_table(plan: Plan) -> Table:
    """Return the layers with parameters; blocks whose layers have the same shapes share a line."""
    lines, magnitudes = plan.trained.lines, plan.config.method == "dora"
    alike: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in plan.model.layers:
        rank = lines[layer.path].rank if layer.path in lines else None
        trains = layer.path in plan.trained.own_paths
        alike[layer.inner_path, layer.stored, layer.bias, rank, trains].append(layer)
    titles = ("Layer (in its block)", "Times", "Weight", "Each", "All", "Trained", "Per cent")
    rows: list[tuple[str, ...]] = []
    for (inner_path, *_), layers in alike.items():
        first = layers[0]
        trained = first.parameters if first.path in plan.trained.own_paths else 0
        if line := lines.get(first.path):
            trained = line.trained_factors + (first.out if magnitudes else 0)
        weight = " × ".join(f"{size:,}" for size in first.oriented)
        rows.append(
            (
                str(inner_path) + (" (tied)" if first.tied_to else ""),
                f"{len(layers)}",
                weight + (" + bias" if first.bias else ""),
                f"{first.parameters:,}",
                f"{sum(layer.parameters for layer in layers):,}",
                f"{trained * len(layers):,}" if trained else "",
                f"{trained / (first.out * first.in_):.2%}" if trained else "",
            )
        )
    count = f"{plan.trained.count:,}"
    total = ("total", "", "", "", f"{plan.model.parameters:,}", count, f"{plan.share:.3%}")
    _, *numbers = zip(titles, *rows, total, strict=True)
    left = WIDTH - sum(2 + max(map(len, column)) for column in numbers)
    table = plain_table(*titles)
    for name, *cells in rows:
        table.add_row(escape(_broken(name, left)), *cells)
    table.columns[0].no_wrap = True  # names are broken already
    table.add_section()
    table.add_row(*total, style="bold")
    return table


def methods_table(plan: Plan, free: int | None) -> Table:
    """Return what each method would train and need, with the plan's other settings."""
    # Forward: what a pass keeps for the way back.
    table = plain_table(
        "Method", "Trained", "Per cent", "Weights", "Gradients", "Adam", "Forward", "Peak", "Fits"
    )
    for title, other in comparison(plan):
        memory = other.memory
        amounts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        fits = "" if free is None else "no" if memory.peak > free else "yes"
        if fits == "yes" and memory.peak > (1 - MARGIN) * (free or 0):
            fits = "just"
        table.add_row(
            title,
            f"{other.trained.count:,}",
            f"{other.share:.3%}",
            *(bytes_text(amount.value) for amount in amounts),
            bytes_text(memory.peak),
            fits,
            style="bold" if title == plan.config.method else None,
        )
    table.columns[0].no_wrap = True
    return table


def memory_table(plan: Plan, *, formulas: bool) -> Table:
    """Return the plan's memory line by line, with each line's formula if asked for."""
    config = plan.config
    table = plain_table(f"Memory of {config.method}, {config.tokens_per_batch:,} tokens", "Bytes")
    if formulas:
        table.add_column("= sum of", overflow="fold")
    for amount in plan.memory.amounts:
        row = [amount.name, bytes_text(amount.value)]
        table.add_row(*row, *([amount.formula] if formulas else []))
    table.add_section()
    table.add_row("peak", bytes_text(plan.memory.peak), style="bold")
    for amount in plan.memory.beside:
        row = [amount.name, bytes_text(amount.value)]
        table.add_row(*row, *([amount.formula] if formulas else []), style="dim")
    return table


def notes(plan: Plan) -> list[str]:
    """Return what is not counted, left out or not quantized, and why numbers are smaller than those
    that are often quoted."""
    sizes = plan.sizes
    lines = [f"[dim]Left out: {escape(why)}[/]" for why in unsuited(plan)]
    lines += mixture_lines(plan)
    comes_to = recompute_of(plan.config, sizes, plan.trained)
    if comes_to != plan.config.recompute:
        lines.append(
            f"[yellow]--recompute {plan.config.recompute} does not suit this model: its layers are "
            f"computed whole again ({comes_to}).[/]"
        )
    if plan.notice:
        return [*lines, f"[yellow]{plan.notice}[/]"]
    under = [x for x in plan.trained.adapted if x.layer.name in ("k_proj", "v_proj")]
    if sizes.kv == sizes.q or not under or plan.config.method not in ADAPTING:
        return lines
    square = plan.trained.count + sum(line.rank * (sizes.q - line.out) for line in under)
    return [
        *lines,
        f"[dim]Grouped-query attention: k and v are {sizes.dim:,} → {sizes.kv:,}, not → "
        f"{sizes.q:,}. With as many heads of keys and values as of queries, these adapters would "
        f"have {square:,} parameters instead of {plan.trained.count:,}.[/]",
    ]


def mixture_lines(plan: Plan) -> list[str]:
    """Return what of a mixture a token needs and a pass reads, and what --bits leaves of it."""
    reads = plan.reads
    if reads is None:
        return []
    active, tokens = plan.sizes.active_parameters, plan.config.tokens_per_batch
    disk = plan.memory.on_disk.value
    where = f", of {bytes_text(disk)} on the disk" if plan.config.mapped else ""
    lines = [
        f"{active:,} parameters compute a token ({active / plan.model.parameters:.1%}).",
        f"Were tokens routed evenly, a pass of {tokens:,} would reach {reads.reached:,.1f} of "
        f"{reads.experts_a_block:,} experts in a block and read {bytes_text(reads.bytes)}{where}: "
        f"{bytes_text(reads.shared)} for every token and {bytes_text(reads.experts)} of experts, "
        f"{'forward and backward' if reads.ways == 2 else 'forward twice and backward'}.",
    ]
    if plan.config.mapped:
        lines.append(
            "Memory that is free beside the peak keeps what was read: with "
            f"{bytes_text(reads.bytes)} more, nothing is read from the disk twice."
        )
    quantizable = {layer.path for layer in plan.model.quantizable}
    left = [x for x in plan.model.layers if x.is_stack and x.path not in quantizable]
    if left:
        share = sum(layer.parameters for layer in left) / plan.model.parameters
        lines.append(f"{share:.0%} of the weights are experts, which --bits leaves as they are.")
    return lines


def verdict(plan: Plan, free: int | None, *, elsewhere: bool = False) -> str:
    """Return whether the plan fits `free` bytes and, if not, what would make it fit.

    elsewhere: these are of another machine than this one.
    """
    peak = f"{bytes_text(plan.memory.peak)} (GB: 10⁹ bytes)"
    if free is None:
        return f"Peak {peak}; how much is free here, this system does not say."
    here = f"Peak {peak}; {bytes_text(free)} are " + (
        "what --memory says, not what is free here" if elsewhere else "free here"
    )
    if plan.memory.peak <= (1 - MARGIN) * free:
        return f"[green]{here}: it fits.[/]"
    if plan.memory.peak <= free:
        less = gentlest(plan, int((1 - MARGIN) * free))
        roomy = less and f" {flags(plan.config, less.config)} needs {bytes_text(less.memory.peak)}."
        return f"[yellow]{here}: it just fits, with less than {MARGIN:.0%} left.[/]{roomy or ''}"
    better = gentlest(plan, free)
    if better is None:
        return f"[red]{here}: it does not fit, whatever its settings.[/]"
    disk = better.memory.on_disk.value
    mapped = f", and {bytes_text(disk)} on the disk that veneer quantize wrote" if disk else ""
    return (
        f"[yellow]{here}: it does not fit.[/] With [bold]{flags(plan.config, better.config)}[/] it "
        f"would: {bytes_text(better.memory.peak)}{mapped}."
    )


def _broken(name: str, width: int) -> str:
    """Return a name in lines of up to `width`, broken behind dots or else underscores."""
    if len(name) <= width:
        return name
    end = max(name.rfind(".", 0, width), 0) or max(name.rfind("_", 0, width), 0)
    return f"{name[: end + 1]}\n{_broken(name[end + 1 :], width)}" if end else name


def plain_table(first: str, *others: str) -> Table:
    """Return a table of this width, none of whose numbers is broken."""
    table = new_table(first, *others, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.no_wrap = True
    return table
