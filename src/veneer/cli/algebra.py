"""`veneer combine`, `extract` and `diff`, and what `inspect` shows of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.adapter.config import LoRA
from veneer.algebra.change import LayerFit
from veneer.algebra.combine import combine
from veneer.algebra.config import CombineConfig, ExtractConfig
from veneer.algebra.extract import LeftOut, extract
from veneer.algebra.measure import Measured, diff, inspect, is_dora, total_cosine, total_norm
from veneer.cli.console import ERRORS, OUTPUT, bytes_text, quieten_libraries
from veneer.cli.grid import Panel, draw_heatmaps, grid_table
from veneer.errors import ConfigError, VeneerError
from veneer.files import size_of
from veneer.formats.adapters import read, write
from veneer.formats.names import FormatName
from veneer.formats.state import AdapterState

WIDTH = 110  # columns of the tables where there is no terminal: in fewer, figures would be broken
MOST_LEFT_OUT = 8  # weights that are named one by one


def run_combine(
    places: Sequence[Path], weights: str | None, config: CombineConfig, *, format: FormatName
) -> None:
    if len(places) < 2:
        raise ConfigError("Name one adapter or more, and then the directory for the result.")
    *adapters, out = places
    _refuse_to_replace(out)
    factors = [1.0] * len(adapters) if weights is None else _numbers(weights)
    quieten_libraries()
    states = [read(place) for place in adapters]
    found = combine(states, factors, **asdict(config))
    write(found.state, out, format=format)
    _show_notices(found.notices)
    if config.method != "sum":
        _print(_fit_table(found.layers))
    count = "1 adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    OUTPUT.print(
        f"{count} by {config.method}: rank {_span([fit.rank for fit in found.layers])} over "
        f"{len(found.layers)} layers, {found.energy:.2%} of the change kept",
        soft_wrap=True,
    )
    _say_saved(out)


def run_extract(
    base: str, tuned: str, out: Path, config: ExtractConfig, *, format: FormatName, force: bool
) -> None:
    _refuse_to_replace(out)
    quieten_libraries()
    found = extract(base, tuned, **asdict(config), force=force)
    write(found.state, out, format=format)
    _show_notices(found.notices)
    _print(_fit_table(found.layers))
    for line in _left_out_lines(found.left_out):
        OUTPUT.print(line, soft_wrap=True)
    OUTPUT.print(
        f"All weights changed by {found.relative:.2%} of their size. {len(found.layers)} "
        f"layers have an adapter, of rank {_span([fit.rank for fit in found.layers])}, which keeps "
        f"{found.energy:.2%} of their change; {found.left_out_share:.2%} of all change lies in "
        "weights left out",
        soft_wrap=True,
    )
    _say_saved(out)


def run_diff(one: Path, other: Path, *, picture: Path | None) -> None:
    states = read(one), read(other)
    pairs = diff(*states)
    for state, place in zip(states, (one, other), strict=True):
        _say_what_is_not_measured(state, place)
    sides = [pair.one for pair in pairs], [pair.other for pair in pairs]
    for place, side in zip((one, other), sides, strict=True):
        _print(_measured_table(escape(str(place)), side))
    cosines = {pair.path: pair.cosine for pair in pairs}
    _print(
        grid_table(
            "Cosine",
            {path: "" if cosine is None else f"{cosine:+z.3f}" for path, cosine in cosines.items()},
        )
    )
    both = sum(pair.one is not None and pair.other is not None for pair in pairs)
    cosine = total_cosine(pairs)
    OUTPUT.print(
        f"{len(pairs)} layers, {both} of them in both; ‖ΔW‖ {total_norm(sides[0]):.4g} and "
        f"{total_norm(sides[1]):.4g}, "
        + ("no cosine, for one is nothing" if cosine is None else f"cosine {cosine:+.4f} over all"),
        soft_wrap=True,
    )
    if picture is not None:
        known = {path: cosine for path, cosine in cosines.items() if cosine is not None}
        most = max(layer.norm for side in sides for layer in side if layer)
        norms = [
            Panel(
                f"‖ΔW‖ of {place.name}",
                {each.path: each.norm for each in side if each},
                span=(0.0, most),
            )
            for place, side in zip((one, other), sides, strict=True)
        ]
        draw_heatmaps([*norms, Panel("cosine", known, "{:+z.2f}", (-1.0, 1.0))], picture)
        OUTPUT.print(f"[bold]Picture[/] {escape(str(picture))}", soft_wrap=True)


def run_inspect_adapter(place: Path, *, picture: Path | None) -> None:
    state = read(place)
    layers = inspect(state)
    _say_what_is_not_measured(state, place)
    _print(_measured_table(escape(str(place)), layers))
    assert isinstance(state.config, LoRA)
    mean = sum(layer.effective_rank for layer in layers) / len(layers)
    OUTPUT.print(
        f"{len(layers)} layers of {escape(state.base_name or 'an unnamed base')}, rank "
        f"{_span([layer.rank for layer in layers])}, "
        f"{sum(tensor.numel() for tensor in state.tensors.values()):,} parameters; ‖ΔW‖ "
        f"{total_norm(layers):.4g} over all, effective rank {mean:.1f} in the mean",
        soft_wrap=True,
    )
    if picture is not None:
        panels = [
            Panel("‖ΔW‖", {layer.path: layer.norm for layer in layers}),
            Panel(
                "effective rank", {layer.path: layer.effective_rank for layer in layers}, "{:.1f}"
            ),
        ]
        draw_heatmaps(panels, picture)
        OUTPUT.print(f"[bold]Picture[/] {escape(str(picture))}", soft_wrap=True)


def _measured_table(name: str, layers: Sequence[Measured | None]) -> Table:
    return grid_table(
        f"{name}: ‖ΔW‖ (effective rank)",
        {x.path: f"{x.norm:.3g} ({x.effective_rank:.1f})" for x in layers if x is not None},
    )


def _fit_table(fits: Sequence[LayerFit]) -> Table:
    return grid_table(
        "Rank: share of ‖ΔW‖² kept", {fit.path: f"{fit.rank}: {fit.energy:.1%}" for fit in fits}
    )


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a line for each weight that changed and is left out, the largest changes first."""
    by_size = sorted(left_out, key=lambda each: -each.norm)
    lines = [
        f"Left out: {escape(each.name)}, changed by "
        f"{each.relative:.2%} of its size (‖ΔW‖ {each.norm:.3g})"
        for each in by_size[:MOST_LEFT_OUT]
    ]
    if rest := by_size[MOST_LEFT_OUT:]:
        most = max(each.relative for each in rest)
        lines.append(f"Left out: {len(rest)} more, changed by at most {most:.2%} of their size")
    return lines


def _say_what_is_not_measured(state: AdapterState, place: Path) -> None:
    if is_dora(state):
        _show_notices([f"{place} is DoRA: B A is measured, without the lengths of the rows."])
    if state.rows is not None:
        _show_notices([f"The {len(state.rows.words)} new words of {place} are not measured."])


def _show_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        ERRORS.print(f"  [yellow]note[/] {escape(notice)}")


def _say_saved(out: Path) -> None:
    OUTPUT.print(
        f"[bold]Saved[/]   {escape(str(out))} ({bytes_text(size_of(out))})", soft_wrap=True
    )


def _print(table: Table) -> None:
    output = OUTPUT if OUTPUT.is_terminal else Console(highlight=False, width=WIDTH)
    output.print(table)
    output.print()


def _refuse_to_replace(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise VeneerError(f"{out} holds something already; name another place.")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"weights are {text!r}, but must be numbers such as 0.7,-0.3.") from error


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
