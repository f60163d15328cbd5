"""Tables for the terminal."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from veneer.adapter.certify import MergeReport
from veneer.adapter.merge import LayerLoss, share
from veneer.adapter.report import QuantizedReport, TargetLine, TargetReport
from veneer.cli.console import bytes_text
from veneer.formats.gguf.model import MergedTensor, kept_of
from veneer.formats.quantized import QuantizedLayer
from veneer.plan.plan import Plan


def target_summary(report: TargetReport) -> str:
    """Return one line: what trains, how many parameters, and what part that is."""
    return (
        f"{report.what}; {report.trained:,} of {report.base_parameters:,} "
        f"parameters train ({report.share:.2%})"
    )


def plan_summary(plan: Plan, room: int | None) -> str:
    """Return one line: the memory that a run needs at its peak, of what, and what there is."""
    parts = [
        f"{amount.name} {bytes_text(amount.value)}"
        for amount in (*plan.memory.amounts, plan.memory.on_disk)
        if amount.value
    ]
    there = "" if room is None else f" of {bytes_text(room)} that are free"
    return f"{bytes_text(plan.memory.peak)}{there}: {', '.join(parts)}"


def quantized_summary(report: QuantizedReport) -> str:
    """Return one line: what of the base is packed, and its real size."""
    return (
        f"{report.layers} linear layers in {report.kind}: {report.bits:.3f} bits a parameter, "
        f"{bytes_text(report.bytes)}; all else {bytes_text(report.other_bytes)}"
    )


def quantized_table(layers: Sequence[QuantizedLayer]) -> Table:
    """Return the packed layers; those of the same name and shape share a line."""
    same: dict[tuple[str, int, int], list[QuantizedLayer]] = defaultdict(list)
    for layer in layers:
        same[_in_block(layer.path), layer.out, layer.in_].append(layer)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Layer (in its block)", overflow="fold")
    for title in ("Blocks", "Weight", "Bits", "Size", "Error", "Worst"):
        table.add_column(title, justify="right")
    for (name, out, in_), alike in same.items():
        errors = [layer.error for layer in alike]
        table.add_row(
            name,
            f"{len(alike)}",
            f"{out:,} × {in_:,}",
            f"{alike[0].bits:.3f}",
            bytes_text(sum(layer.bytes for layer in alike)),
            f"{sum(errors) / len(errors):.2%}",
            f"{max(errors):.2%}",
        )
    return table


def merged_table(tensors: Sequence[MergedTensor]) -> Table:
    """Return what was stored anew; tensors of the same name in their block share a line."""
    same: dict[tuple[str, str, str], list[MergedTensor]] = defaultdict(list)
    for tensor in tensors:
        same[_in_block(tensor.name), tensor.was, tensor.kind].append(tensor)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Tensor (in its block)", overflow="fold")
    for title in ("Blocks", "Was", "Is", "Error", "Worst", "Change kept"):
        table.add_column(title, justify="right")
    for (name, was, kind), alike in same.items():
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
    worst = report.worst
    lines = []
    if worst is not None:
        lines.append(
            f"rounding to {report.dtype} took {report.lost:.2%} of the adapter's change "
            f"(at most {worst.lost:.1%}, in {escape(worst.path)}); in float32 it would take "
            f"{report.lost_in_float32:.2%}"
        )
    lines.append(
        f"on {report.tokens:,} tokens merged and unmerged differ by {report.divergence:.2g} nats a "
        f"token (KL), and by {report.logit_difference:.2g} in the logit that differs most; the "
        f"adapter itself makes {report.effect:.2g} nats"
    )
    if report.lost_packed_again is not None:
        lines.append(
            f"the base is packed; the merged model is kept unpacked, in {report.dtype}: packing "
            f"it again as it was would take {report.lost_packed_again:.1%} of the adapter's "
            f"change, and {report.divergence_packed_again:.2g} nats a token"
        )
    return lines


def merge_table(report: MergeReport) -> Table:
    """Return the share of each layer's change that rounding took; blocks share a line."""
    same: dict[str, list[LayerLoss]] = defaultdict(list)
    for layer in report.layers:
        same[_in_block(layer.path)].append(layer)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Layer (in its block)", overflow="fold")
    for title in ("Blocks", "‖ΔW‖", "Lost", "Worst"):
        table.add_column(title, justify="right")
    for name, alike in same.items():
        table.add_row(
            name,
            f"{len(alike)}",
            f"{math.hypot(*(layer.change for layer in alike)):.3g}",
            f"{share((layer.rounded for layer in alike), alike):.2%}",
            f"{max(layer.lost for layer in alike):.2%}",
        )
    return table


def target_table(report: TargetReport) -> Table:
    """Return the adapted layers; blocks whose layers have the same shapes share a line."""
    same: dict[tuple[str, int, int, int, int], list[TargetLine]] = defaultdict(list)
    for line in report.lines:
        same[_in_block(line.path), line.out, line.in_, line.rank, line.trained].append(line)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Layer (in its block)", overflow="fold")
    for title in ("Blocks", "Weight", "Rank", "Each", "Per cent", "Trained"):
        table.add_column(title, justify="right")
    for (pattern, out, in_, rank, trained), lines in same.items():
        table.add_row(
            pattern,
            f"{len(lines)}",
            f"{out:,} × {in_:,}",
            f"{rank}",
            f"{trained:,}",
            f"{lines[0].share:.2%}",
            f"{trained * len(lines):,}",
        )
    return table


def _in_block(path: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", path)
