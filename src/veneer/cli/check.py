"""`veneer check`: whether a runtime will load an adapter, as a table of findings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from veneer.cli.console import OUTPUT, new_table, quieten_libraries
from veneer.cli.flags import AnyAdapter
from veneer.formats.names import RuntimeName

if TYPE_CHECKING:
    from veneer.formats.runtimes.check import Checked

COLOURS = {"ok": "green", "needs": "yellow", "no": "red"}


def check(
    adapter: AnyAdapter,
    /,
    *,
    for_: Annotated[RuntimeName, Parameter(name="--for", help="The runtime that is to load it.")],
) -> int:
    """Return 0 where the runtime will load the adapter, else 1."""
    from veneer.formats.runtimes.check import check as check_adapter

    quieten_libraries()
    checked = check_adapter(adapter, for_)
    OUTPUT.print(findings_table(checked))
    verdict = "will load, as it is or as said above" if checked.loads else "will not load as it is"
    runtime = checked.runtime
    proof = f"run by {runtime.run} too" if runtime.run else "not run"
    OUTPUT.print(
        f"[bold]{runtime.title}[/]: {verdict}. Read in its source, {proof}: "
        f"{escape(runtime.read_in)}"
    )
    return 0 if checked.loads else 1


def findings_table(checked: Checked) -> Table:
    """Return one line a finding: the verdict, on what, why, and what to do."""
    table = new_table("")
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
