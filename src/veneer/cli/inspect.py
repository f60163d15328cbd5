"""`veneer inspect` and `veneer diff`: what would train, and how large an adapter's changes are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from veneer.adapter.config import LoRA
from veneer.cli.console import OUTPUT, print_narrow, print_wide, quieten_libraries, show_notice
from veneer.cli.flags import Flat, Picture
from veneer.cli.grid import Panel, draw_heatmaps, grid_table
from veneer.cli.tables import span, target_summary, target_table
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from veneer.algebra.measure import Measured
    from veneer.formats.state import AdapterState
    from veneer.fused.structure import LayerStructure


def inspect(
    model: Annotated[
        str,
        Parameter(
            help="Adapter; or a base: preset (qwen3-8b, ...), config.json, directory, .gguf file, "
            "or hub name."
        ),
    ],
    /,
    *,
    lora: Annotated[LoRA | None, Flat] = None,  # None: none of its flags is there
    picture: Picture = None,
) -> None:
    """Tell an adapter's directory from a model by what is in it."""
    from veneer.adapter.report import report_targets
    from veneer.formats.adapters import holds_adapter
    from veneer.models.load import skeleton_of
    from veneer.plan.find import find_config
    from veneer.plan.stored import stored_of

    quieten_libraries()
    if holds_adapter(Path(model)):
        if lora is not None:
            raise ConfigError(f"{model} is an adapter: flags of one that would train do nothing.")
        _inspect_adapter(Path(model), picture)
        return
    if picture is not None:
        raise ConfigError(f"--picture is of an adapter, and {model} holds none.")
    config = find_config(model)
    skeleton = skeleton_of(config)
    report = report_targets(skeleton, lora or LoRA())
    print_narrow(target_table(report), "Each", "Per cent", on=OUTPUT)
    OUTPUT.print(target_summary(report))
    if report.uncovered:
        show_notice(report.uncovered, on=OUTPUT)
    for remark in report.remarks:
        show_notice(remark, on=OUTPUT)
    OUTPUT.print(f"[bold]Fused[/] {escape(_fused_layers(skeleton))}")
    if experts := _experts(skeleton):
        OUTPUT.print(f"[bold]Experts[/] {escape(experts)}")
    if stored := stored_of(model, config):
        how = f"{stored.bits} bits" + (", the head too" if stored.head else "")
        if stored.format:
            which = ", experts alone" if stored.experts_alone else ""
            how = f"{stored.bits_a_number:.2f} bits a number{which}"
            how += f" ({stored.format}, as it was published)"
        OUTPUT.print(f"[bold]Weights[/] quantized, in {how}")


def _fused_layers(skeleton: PreTrainedModel) -> str:
    """Return which decoder layers are likely computed as two functions, and why the others are not,
    in words. A skeleton shows how they are made; their numbers are proven when a run begins."""
    import torch

    from veneer.fused.recognise import structures

    # On the meta device, transformers multiplies experts only in 16 bits.
    layers = structures(skeleton.to(torch.bfloat16))  # type: ignore[arg-type]
    if not layers:
        return "no layers: no decoder layers are known."
    reasons = Counter(why for layer in layers if (why := _why_not_fused(layer)) is not None)
    fused = len(layers) - reasons.total()
    if not fused and len(reasons) == 1:
        return f"none of {len(layers)} decoder layers: {next(iter(reasons))}."
    text = f"{fused} of {len(layers)} decoder layers"
    if fused:
        text += ", which a run proves before it begins"
    mixtures = [layer for layer in layers if not isinstance(layer, str) and layer.mixture]
    if mixtures:
        text += f"; of {len(mixtures)}, beside a mixture of experts, attention alone"
    return "; ".join([text, *(f"{count} not: {why}" for why, count in reasons.items())]) + "."


def _experts(skeleton: PreTrainedModel) -> str | None:
    """Return a mixture's experts in words: how many, what computes a token, and whether they are
    computed as one function; None for any other model."""
    from veneer.adapter.experts import has_experts
    from veneer.cli.plan_tables import feed_forward
    from veneer.models.description import describe
    from veneer.plan.sizes import Sizes

    sizes = Sizes(describe(skeleton))
    mixed = [block for block in sizes.blocks if block.routed]
    if not mixed:
        return None
    active, parameters = sizes.active_parameters, sizes.description.parameters
    modules = [layer.module for block in mixed for layer in block.expert_layers]
    how = "they are computed as one function, which a run proves before it begins"
    if not all(map(has_experts, modules)):
        how = "they are not computed as one function: they do not follow transformers' contract"
    return f"{feed_forward(sizes)}; {active:,} of {parameters:,} parameters compute a token; {how}."


def _why_not_fused(layer: LayerStructure | str) -> str | None:
    if not isinstance(layer, str):
        return None
    return "only a run can tell" if re.match(r"\w+Error: ", layer) else layer


def diff(
    first: Annotated[Path, Parameter(help="Adapter directory.")],
    second: Annotated[Path, Parameter(help="Adapter directory, over the same base.")],
    /,
    *,
    picture: Picture = None,
) -> None:
    """Show each adapter's changes, then the cosine between them."""
    from veneer.algebra import measure
    from veneer.formats.adapters import read

    places = first, second
    states = read(first), read(second)
    pairs = measure.diff(*states)
    sides = [pair.one for pair in pairs], [pair.other for pair in pairs]
    cosines = {pair.path: pair.cosine for pair in pairs}
    if picture is not None:
        largest = max(layer.norm for side in sides for layer in side if layer)
        panels = [
            Panel(
                f"‖ΔW‖ of {place.name}",
                {layer.path: layer.norm for layer in side if layer},
                span=(0.0, largest),
            )
            for place, side in zip(places, sides, strict=True)
        ]
        shown = {path: cosine for path, cosine in cosines.items() if cosine is not None}
        _draw([*panels, Panel("cosine", shown, "{:+z.2f}", (-1.0, 1.0))], picture)
    for state, place in zip(states, places, strict=True):
        _show_what_is_not_measured(state, place)
    for side, place in zip(sides, places, strict=True):
        _show(_measured_table(place, side))
    _show(grid_table("Cosine", {p: "" if c is None else f"{c:+z.3f}" for p, c in cosines.items()}))
    common = sum(pair.one is not None and pair.other is not None for pair in pairs)
    cosine = measure.total_cosine(pairs)
    norms = [measure.total_norm(side) for side in sides]
    OUTPUT.print(
        f"{len(pairs)} layers, {common} of them in both; ‖ΔW‖ {norms[0]:.4g} and {norms[1]:.4g}, "
        + ("no cosine, for one is nothing" if cosine is None else f"cosine {cosine:+.4f} over all")
    )


def _inspect_adapter(place: Path, picture: Path | None) -> None:
    from veneer.algebra import measure
    from veneer.formats.adapters import read

    state = read(place)
    layers = measure.inspect(state)
    if picture is not None:
        norms = {layer.path: layer.norm for layer in layers}
        ranks = {layer.path: layer.effective_rank for layer in layers}
        _draw([Panel("‖ΔW‖", norms), Panel("effective rank", ranks, "{:.1f}")], picture)
    _show_what_is_not_measured(state, place)
    _show(_measured_table(place, layers))
    mean = sum(layer.effective_rank for layer in layers) / len(layers)
    OUTPUT.print(
        f"{len(layers)} layers of {escape(state.base_name or 'an unnamed base')}, rank "
        f"{span([layer.rank for layer in layers])}, "
        f"{sum(tensor.numel() for tensor in state.tensors.values()):,} parameters; ‖ΔW‖ "
        f"{measure.total_norm(layers):.4g} over all, effective rank {mean:.1f} in the mean"
    )


def _measured_table(place: Path, layers: Sequence[Measured | None]) -> Table:
    return grid_table(
        f"{escape(str(place))}: ‖ΔW‖ (effective rank)",
        {x.path: f"{x.norm:.3g} ({x.effective_rank:.1f})" for x in layers if x is not None},
    )


def _show_what_is_not_measured(state: AdapterState, place: Path) -> None:
    from veneer.algebra.measure import is_dora
    from veneer.formats.contents import acts_from

    if where := acts_from(state):
        show_notice(f"{place} acts {where} alone.")
    if is_dora(state):
        show_notice(f"{place} is DoRA: B A is measured, without the lengths of the rows.")
    if state.new_tokens is not None:
        show_notice(f"The {len(state.new_tokens.tokens)} new tokens of {place} are not measured.")


def _show(table: Table) -> None:
    print_wide(table)
    OUTPUT.print()


def _draw(panels: Sequence[Panel], picture: Path) -> None:
    draw_heatmaps(panels, picture)
    OUTPUT.print(f"[bold]Picture[/] {escape(str(picture))}")
