"""`veneer check`: what a runtime makes of an adapter, as a table."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from veneer.cli.console import OUTPUT, quieten_libraries
from veneer.formats.names import RuntimeName
from veneer.formats.runtimes.check import Checked, check

COLOURS = {"ok": "green", "needs": "yellow", "no": "red"}


def run_check(adapter: Path, runtime: RuntimeName) -> int:
    quieten_libraries()
    checked = check(adapter, runtime)
    OUTPUT.print(findings_table(checked))
    verdict = "will load, as it is or as said above" if checked.loads else "will not load as it is"
    read = checked.runtime
    proof = "run in our tests too" if read.run else "not run"
    OUTPUT.print(
        f"[bold]{read.title}[/]: {verdict}. Read in its source, {proof}: {escape(read.read_in)}",
        soft_wrap=True,
    )
    return 0 if checked.loads else 1


def findings_table(checked: Checked) -> Table:
    """Return one line a finding: the verdict, on what, why, and what to do."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("What", "Says", "Do"):
        table.add_column(title, overflow="fold")
    for finding in checked.findings:
        colour = COLOURS[finding.verdict]
        table.add_row(
            f"[{colour}]{finding.verdict}[/]",
            escape(finding.what),
            escape(finding.says),
            escape(finding.do),
        )
    return table
