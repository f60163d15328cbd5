"""`veneer verify`: whether files are as they were written, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from veneer.cli.console import OUTPUT, new_table, quieten_libraries
from veneer.errors import listed


def verify(
    places: Annotated[
        tuple[Path, ...],
        Parameter(help="Directories of adapters, checkpoints, models or runs.", negative=()),
    ],
    /,
) -> int:
    """Return 0 where all files are as they were written, else 1."""
    from veneer.formats.verify import Verified, verify

    quieten_libraries()
    results = [result for place in places for result in verify(place)]
    table = new_table("Directory")
    table.add_column("Files", justify="right")
    table.add_column("Says", overflow="fold")

    def says(result: Verified) -> str:
        if result.leftover:
            return "[yellow]left by a killed process; the next command that writes there removes it"
        if result.problems:
            lines = [f"{name}: {why}" for name, why in result.problems.items()]
            return f"[red]damaged[/]: {escape(listed(lines, most=10, between='; '))}"
        if not result.sums:
            return "[yellow]no checksums; its tensors can be read"
        more = f"; without a checksum: {escape(listed(result.unlisted))}" if result.unlisted else ""
        return f"[green]whole[/]{more}"

    for result in results:
        table.add_row(escape(str(result.place)), str(result.sums or ""), says(result))
    OUTPUT.print(table)
    return 0 if all(result.whole for result in results) else 1
