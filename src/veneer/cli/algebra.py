"""`veneer combine` and `veneer extract`: an adapter of several, or of a full fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

import veneer
from veneer.algebra.config import CombineConfig, ExtractConfig
from veneer.cli.console import (
    OUTPUT,
    print_wide,
    quieten_libraries,
    refuse_to_replace,
    show_notice,
    show_saved,
)
from veneer.cli.flags import AdapterFormat, Device, Flat, Model, Switch
from veneer.cli.grid import grid_table
from veneer.cli.tables import span
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.algebra.change import LayerFit
    from veneer.algebra.extract import UncoveredWeight

MOST_NAMED = 8  # weights that change and get no adapter: the largest are named one by one


def combine(
    *places: Annotated[
        Path, Parameter(help="Adapter directories, and last the directory for the result.")
    ],
    weights: Annotated[
        str | None,
        Parameter(help="A factor for each, such as 0.7,-0.3; 1 for all unless given."),
    ] = None,
    settings: Annotated[CombineConfig, Flat] = CombineConfig(),
    format: AdapterFormat = "native",
) -> None:
    """Write the combined adapter, and show how much of the change it keeps."""
    from veneer.formats.adapters import read, write

    if len(places) < 2:
        raise ConfigError("Name one adapter or more, and then the directory for the result.")
    *adapters, out = places
    refuse_to_replace(out)
    factors = [1.0] * len(adapters) if weights is None else _numbers(weights)
    quieten_libraries()
    combined = veneer.combine([read(place) for place in adapters], factors, **asdict(settings))
    notes = write(combined.state, out, format=format)
    for notice in (*combined.notices, *notes):
        show_notice(notice)
    if settings.method != "sum":
        _show_fits(combined.layers)
    count = "1 adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    OUTPUT.print(
        f"{count} by {settings.method}: rank {_ranks(combined.layers)} over "
        f"{len(combined.layers)} layers, {combined.energy:.2%} of the change kept"
    )
    show_saved(out)


def extract(
    base: Model,
    tuned: Annotated[str, Parameter(help="The same model after full fine-tuning, by any name.")],
    out: Annotated[Path, Parameter(help="Directory for the adapter.")],
    /,
    *,
    settings: Annotated[ExtractConfig | None, Flat] = None,  # it has no default: see below
    device: Device = "auto",
    format: AdapterFormat = "native",
    force: Annotated[
        Switch, Parameter(help="Go on even if TUNED does not look like a tuned BASE.")
    ] = False,
) -> None:
    """Write the adapter, and show what it keeps of each layer and which changes it leaves."""
    from veneer.formats.adapters import write

    settings = settings or ExtractConfig()  # raises ConfigError: a rank or an energy is needed
    refuse_to_replace(out)
    quieten_libraries()
    extracted = veneer.extract(base, tuned, **asdict(settings), force=force, device=device)
    notes = write(extracted.state, out, format=format)
    for notice in (*extracted.notices, *notes):
        show_notice(notice)
    _show_fits(extracted.layers)
    for line in _uncovered_lines(extracted.uncovered):
        OUTPUT.print(line)
    OUTPUT.print(
        f"All weights changed by {extracted.relative:.2%} of their size. "
        f"{len(extracted.layers)} layers have an adapter, of rank {_ranks(extracted.layers)}, "
        f"which keeps {extracted.energy:.2%} of their change; {extracted.uncovered_share:.2%} of "
        "all change lies in weights left out"
    )
    show_saved(out)


def _show_fits(fits: Sequence[LayerFit]) -> None:
    cells = {fit.path: f"{fit.rank}: {fit.energy:.1%}" for fit in fits}
    print_wide(grid_table("Rank: share of ‖ΔW‖² kept", cells))
    OUTPUT.print()


def _uncovered_lines(uncovered: Sequence[UncoveredWeight]) -> list[str]:
    """Return a line for each weight that changed and got no adapter, the largest changes first."""
    by_size = sorted(uncovered, key=lambda weight: -weight.norm)
    lines = [
        f"Left out: {escape(weight.name)}, changed by {weight.relative:.2%} of its size "
        f"(‖ΔW‖ {weight.norm:.3g})"
        for weight in by_size[:MOST_NAMED]
    ]
    if smaller := by_size[MOST_NAMED:]:
        most = max(weight.relative for weight in smaller)
        lines.append(f"Left out: {len(smaller)} more, changed by at most {most:.2%} of their size")
    return lines


def _ranks(fits: Sequence[LayerFit]) -> str:
    return span([fit.rank for fit in fits])


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"weights are {text!r}, but must be numbers such as 0.7,-0.3.") from error
