"""Tables for the terminal."""

from __future__ import annotations

import re
from collections import defaultdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from veneer.methods.report import TargetLine, TargetReport


def target_summary(report: TargetReport) -> str:
    """Return one line: how many layers and parameters train, and what part that is."""
    return (
        f"{len(report.lines)} layers adapted; {report.trained:,} of {report.base_parameters:,} "
        f"parameters train ({report.share:.2%})"
    )


def target_table(report: TargetReport) -> Table:
    """Return the adapted layers; blocks whose layers have the same shapes share a line."""
    same: dict[tuple[str, int, int, int, int], list[TargetLine]] = defaultdict(list)
    for line in report.lines:
        pattern = re.sub(r"^.*?\.\d+\.", "", line.path)
        same[pattern, line.out, line.in_, line.rank, line.trained].append(line)
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
