"""What is known of a model's layers, as tables and lines: layers alike in all blocks share one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape
from rich.table import Table

from veneer.cli.console import bytes_text, new_table
from veneer.errors import share_text

if TYPE_CHECKING:
    from veneer.adapter.certify import MergeReport
    from veneer.adapter.report import QuantizedReport, TargetReport
    from veneer.formats.gguf.model import MergedTensor
    from veneer.formats.quantized import QuantizedLayer
    from veneer.plan.plan import Plan

Layer = TypeVar("Layer")
Key = TypeVar("Key", bound=Hashable)
LAYER = "Layer (in its block)"
LEAST_SHOWN = 0.0005  # of what rounding took of one weight's change


def target_summary(report: TargetReport) -> str:
    """Return one line: what trains, how many parameters, and their share."""
    return (
        f"{report.what}; {report.trained:,} of {report.base_parameters:,} "
        f"parameters train ({report.share:.2%})"
    )


def plan_summary(plan: Plan, free: int | None) -> str:
    """Return one line: the memory that a run needs at its peak, for what, and what is free."""
    amounts = [
        f"{amount.name} {bytes_text(amount.value)}"
        for amount in (*plan.memory.amounts, *plan.memory.beside)
        if amount.value
    ]
    of = "" if free is None else f" of {bytes_text(free)} that are free"
    return f"{bytes_text(plan.memory.peak)}{of}: {', '.join(amounts)}"


def quantized_summary(report: QuantizedReport) -> str:
    """Return one line: what of the base is quantized, and its real size."""
    counts = ((report.layers, "linear layers"), (report.stacks, "stacks of experts"))
    what = " and ".join(f"{count} {name}" for count, name in counts if count)
    return (
        f"{what} in {report.kind}: {report.bits:.3f} bits a parameter, "
        f"{bytes_text(report.bytes)}; all else {bytes_text(report.other_bytes)}"
    )


def quantized_table(layers: Sequence[QuantizedLayer]) -> Table:
    """Return the quantized layers; those of the same name and shape share a line."""
    table = new_table(LAYER, "Blocks", "Weight", "Bits", "Size", "Error", "Worst")
    groups = _alike(
        layers, lambda layer: (_in_block(layer.path), layer.experts, layer.out, layer.in_)
    )
    for (name, experts, out, in_), alike in groups.items():
        errors = [layer.error for layer in alike]
        table.add_row(
            name,
            f"{len(alike)}",
            f"{experts:,} × {out:,} × {in_:,}" if experts else f"{out:,} × {in_:,}",
            f"{alike[0].bits:.3f}",
            bytes_text(sum(layer.bytes for layer in alike)),
            f"{sum(errors) / len(errors):.2%}",
            f"{max(errors):.2%}",
        )
    return table


def merged_table(tensors: Sequence[MergedTensor]) -> Table:
    """Return what was stored anew; tensors of the same name in their block share a line."""
    from veneer.formats.gguf.model import kept_of

    titles = ("Blocks", "Was", "Is", "Error", "Worst", "Change kept")
    table = new_table("Tensor (in its block)", *titles)
    groups = _alike(tensors, lambda tensor: (_in_block(tensor.name), tensor.was, tensor.kind))
    for (name, was, kind), alike in groups.items():
        errors = [tensor.error for tensor in alike]
        table.add_row(
            name,
            f"{len(alike)}",
            was,
            kind,
            f"{sum(errors) / len(errors):.3%}",
            f"{max(errors):.3%}",
            f"{kept_of(alike):.1%}",
        )
    return table


def merge_lines(report: MergeReport) -> list[str]:
    """Return what a merge kept and lost, a line for each thing to know."""
    worst, lines = report.worst, []
    if worst is not None:
        line = f"rounding to {report.dtype} took {share_text(report.lost)} of the adapter's change"
        if worst.lost >= LEAST_SHOWN:
            line += f" (at most {worst.lost:.1%}, in {escape(worst.path)})"
        if report.dtype != "float32":
            line += f"; in float32 it would take {share_text(report.lost_in_float32)}"
        lines.append(line)
    lines.append(
        f"on {report.tokens:,} tokens merged and unmerged differ by {report.divergence:.2g} nats a "
        f"token (KL), and by {report.logit_difference:.2g} in the logit that differs most; the "
        f"adapter itself makes {report.effect:.2g} nats"
    )
    if report.lost_requantized is not None and report.divergence_requantized is not None:
        lines.append(
            f"the base is quantized; the merged model is not, but in {report.dtype}: quantizing "
            f"it again as it was would take {report.lost_requantized:.1%} of the adapter's "
            f"change, and {report.divergence_requantized:.2g} nats a token"
        )
    return lines


def merge_table(report: MergeReport) -> Table:
    """Return the share of each layer's change that rounding took; blocks share a line."""
    from veneer.adapter.merge import relative_error

    table = new_table(LAYER, "Blocks", "‖ΔW‖", "Lost", "Worst")
    for name, alike in _alike(report.layers, lambda layer: _in_block(layer.path)).items():
        table.add_row(
            name,
            f"{len(alike)}",
            f"{math.hypot(*(layer.change for layer in alike)):.3g}",
            f"{relative_error((layer.error for layer in alike), alike):.2%}",
            f"{max(layer.lost for layer in alike):.2%}",
        )
    return table


def target_table(report: TargetReport) -> Table:
    """Return the adapted layers; blocks whose layers have the same shapes share a line."""
    titles = ("Blocks", "Weight", "Rank", "Each", "Per cent", "Trained")
    table = new_table(LAYER, *titles)
    groups = _alike(report.lines, lambda x: (_in_block(x.path), x.out, x.in_, x.rank, x.trained))
    for (name, out, in_, rank, trained), lines in groups.items():
        table.add_row(
            name,
            f"{len(lines)}",
            f"{out:,} × {in_:,}",
            f"{rank}",
            f"{trained:,}",
            f"{lines[0].share:.2%}",
            f"{trained * len(lines):,}",
        )
    return table


def span(numbers: Sequence[int]) -> str:
    """Return the least and the largest of some numbers, or the only one."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _alike(layers: Iterable[Layer], key: Callable[[Layer], Key]) -> dict[Key, list[Layer]]:
    groups: dict[Key, list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[key(layer)].append(layer)
    return groups


def _in_block(path: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", path)
