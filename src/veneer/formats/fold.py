"""The same adapter with fewer settings, for formats that lack some of ours.

Each function returns the adapter and notes on what was changed. What the adapter adds to the base
stays the same, to float32's rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.nn import functional as F

from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, listed
from veneer.formats.state import AdapterState


def without_start(state: AdapterState) -> tuple[AdapterState, list[str]]:
    """Return the adapter as a plain one. If its layers have starts, B A − B₀ A₀ becomes one product
    of twice the rank."""
    config = state.config
    if not isinstance(config, LoRA) or not any(layer.start for layer in state.layers()):
        return state, []
    layers = []
    for layer in state.layers():
        window = layer.A.shape[1:] if layer.A.ndim == 4 else None  # of a convolution
        A = layer.A if window is None else layer.A.flatten(1)
        adapter = Adapter(A, layer.B, scaling=1.0, start=layer.start)
        # Only linear layers have starts; zeros bring the others to the same rank.
        A, B = (factor.detach() for factor in adapter.factors())
        more = 2 * config.rank_of(layer.path) - B.shape[-1]
        A, B = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        A = A if window is None else A.unflatten(1, window)
        layers.append(replace(layer, A=A, B=B, start=None))
    # The scaling, alpha / rank or alpha / √rank, stays as it was.
    stronger = 2**0.5 if config.rslora else 2
    assert config.alpha is not None
    plain = replace(
        config,
        rank=2 * config.rank,
        alpha=stronger * config.alpha,
        rank_pattern={path: 2 * rank for path, rank in config.rank_pattern.items()},
        alpha_pattern={path: stronger * alpha for path, alpha in config.alpha_pattern.items()},
        init="auto",
    )
    note = (
        f"A₀ and B₀, where {config.init} started, are folded into the factors: a plain LoRA of "
        f"rank {2 * config.rank} in place of {config.rank}."
    )
    return replace(state, config=plain).with_layers(layers), [note]


def same_scale(
    state: AdapterState, measure: Mapping[str, float], name: str
) -> tuple[AdapterState, float, list[str]]:
    """Give all layers the most frequent value of `measure`, and fold the quotient into B.

    measure: a factor of what each layer adds, by path, such as its scaling. name: for the note.
    """
    common = Counter(measure.values()).most_common(1)[0][0]
    factors = {path: value / common for path, value in measure.items() if value != common}
    if not factors:
        return state, common, []
    scaled = [
        replace(
            layer,
            B=layer.B.to(torch.promote_types(layer.B.dtype, torch.float32)) * factors[layer.path],
        )
        for layer in state.layers()
        if layer.path in factors
    ]
    note = (
        f"One {name} for all layers, {common:g}: what {listed(factors)} had of their own is "
        "folded into B."
    )
    return state.with_layers(scaled), common, [note]


def same_rank(state: AdapterState, rank: int | None = None) -> tuple[AdapterState, int, list[str]]:
    """Give all layers one rank, `rank` or the highest, by rows and columns of zeros.

    Raises AdapterError if `rank` is less than that of some layer, or a layer has no matrices.
    """
    layers = list(state.layers())
    if others := [layer.path for layer in layers if layer.A.ndim > 3]:  # convolutions
        raise AdapterError(
            f"Only matrices can be given one rank for all layers, unlike {listed(others)}."
        )
    highest = max(layer.B.shape[-1] for layer in layers)
    common = highest if rank is None else rank
    if common < highest:
        raise AdapterError(
            f"Rank {common} is too low: this adapter's is {highest}, and zeros can only add to it."
        )
    padded = []
    for layer in layers:
        if more := common - layer.B.shape[-1]:
            A, B = F.pad(layer.A, (0, 0, 0, more)), F.pad(layer.B, (0, more))
            padded.append(replace(layer, A=A, B=B))
    if not padded:
        return state, common, []
    smaller = listed(layer.path for layer in padded)
    note = f"One rank for all layers, {common}: {smaller} are filled up with zeros."
    return state.with_layers(padded), common, [note]


def uniform(state: AdapterState, rank: int | None = None) -> tuple[AdapterState, list[str]]:
    """Return a LoRA of one rank and one scaling, alpha / rank, for all layers: no patterns, no
    rsLoRA. DoRA's magnitudes stay.

    Raises AdapterError for another method, and if `rank` is less than that of some layer.
    """
    if not isinstance(state.config, LoRA):
        raise AdapterError(f"{state.config.method} has no rank.")
    state, notes = without_start(state)
    config = state.config
    assert isinstance(config, LoRA)
    scalings = {layer.path: config.scaling_of(layer.path) for layer in state.layers()}
    state, scaling, folded = same_scale(state, scalings, "scaling")
    state, common, padded = same_rank(state, rank)
    if config.rslora:
        notes.append(f"rsLoRA's alpha / √rank is written as alpha / rank = {scaling:g}.")
    config = replace(
        config,
        rank=common,
        alpha=scaling * common,
        rslora=False,
        rank_pattern={},
        alpha_pattern={},
    )
    return replace(state, config=config), notes + folded + padded
