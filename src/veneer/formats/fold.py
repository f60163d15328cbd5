"""One adapter written another way: what formats with fewer settings than ours need.

Each function returns the adapter and notes, sentences that say what was done to it. What the
adapter adds to the base stays the same, to float32's rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, listed
from veneer.formats.parts import BIAS, EMBEDDING, LINEAR, MAGNITUDE, PARAMETER, START
from veneer.formats.peft.directory import without_start
from veneer.formats.state import AdapterState, StoredLayer


class PlainLoRA(NamedTuple):
    """A LoRA with its configuration, of which it is known that it has neither start nor extras."""

    config: LoRA
    state: AdapterState
    notes: list[str]


def plain_lora(state: AdapterState, format: str, *, dora: bool) -> PlainLoRA:
    """Return an adapter as low-rank factors and nothing else, with its start folded in.

    Raises AdapterError, which names every part of it that `format` has no place for; DoRA's
    magnitudes are one unless `dora`.
    """
    config = state.config
    if not isinstance(config, LoRA):
        raise AdapterError(f"{format} has no format for {config.method}; write it natively.")
    known = {*LINEAR, *EMBEDDING, *PARAMETER, *START, MAGNITUDE, BIAS}
    problems = state.beyond_factors()
    problems += [key for key in state.tensors if key.rpartition(".")[2] not in known]
    if config.dora and not dora:
        problems.append("DoRA's magnitudes")
    if problems:
        raise AdapterError(
            f"{format} has no place for what this adapter has: {listed(problems)}; merge it, or "
            "write it natively."
        )
    plain = without_start(state)
    assert isinstance(plain.config, LoRA)
    return PlainLoRA(plain.config, plain, start_notes(state))


def start_notes(state: AdapterState) -> list[str]:
    """Return the note on what `without_start` does to an adapter, if it does anything."""
    config = state.config
    if not isinstance(config, LoRA) or not any(layer.start for layer in state.layers()):
        return []
    return [
        f"A₀ and B₀, where {config.init} started, are folded into the factors: a plain LoRA of "
        f"rank {2 * config.rank} in place of {config.rank}."
    ]


def same_scale(
    state: AdapterState, measure: Mapping[str, float], what: str
) -> tuple[AdapterState, float, list[str]]:
    """Give all layers one value of `measure`, the most frequent, and fold the rest into B.

    measure: by path, a number to which what a layer adds is proportional, such as its scaling.
    """
    common = Counter(measure.values()).most_common(1)[0][0]
    factors = {path: value / common for path, value in measure.items() if value != common}
    if not factors:
        return state, common, []
    tensors = dict(state.tensors)
    for layer in state.layers():
        if (factor := factors.get(layer.path)) is not None:
            wide = torch.promote_types(layer.B.dtype, torch.float32)
            tensors[f"{layer.path}.{names(layer)[1]}"] = layer.B.to(wide) * factor
    note = (
        f"One {what} for all layers, {common:g}: what {listed(factors)} had of their own is folded "
        "into B."
    )
    return replace(state, tensors=tensors), common, [note]


def same_rank(state: AdapterState, rank: int | None = None) -> tuple[AdapterState, int, list[str]]:
    """Give all layers one rank, `rank` or the highest, by rows and columns of zeros.

    Raises AdapterError if `rank` is less than that of some layer, or a layer has no matrices.
    """
    if others := [layer.path for layer in state.layers() if layer.A.ndim != 2]:
        raise AdapterError(f"One rank for all can be given to matrices alone: {listed(others)}.")
    ranks = {layer.path: len(layer.A) for layer in state.layers()}
    highest = max(ranks.values())
    wanted = highest if rank is None else rank
    if wanted < highest:
        raise AdapterError(
            f"Rank {wanted} is too low: this adapter's is {highest}, and zeros can only add to it."
        )
    smaller = {path: found for path, found in ranks.items() if found < wanted}
    if not smaller:
        return state, wanted, []
    tensors = dict(state.tensors)
    for layer in state.layers():
        more = wanted - len(layer.A)
        a, b = names(layer)
        tensors[f"{layer.path}.{a}"] = F.pad(layer.A, (0, 0, 0, more))
        tensors[f"{layer.path}.{b}"] = F.pad(layer.B, (0, more))
    note = f"One rank for all layers, {wanted}: {listed(smaller)} are filled up with zeros."
    return replace(state, tensors=tensors), wanted, [note]


def uniform(state: AdapterState, rank: int | None = None) -> tuple[AdapterState, list[str]]:
    """Return a LoRA of one rank and one scaling, alpha / rank, for all layers: no patterns, no
    rsLoRA. DoRA's magnitudes stay.

    Raises AdapterError for another method, and if `rank` is less than that of some layer.
    """
    if not isinstance(state.config, LoRA):
        raise AdapterError(f"{state.config.method} has no rank.")
    notes = start_notes(state)
    state = without_start(state)
    config = state.config
    assert isinstance(config, LoRA)
    scalings = {layer.path: config.scaling_of(layer.path) for layer in state.layers()}
    state, scaling, folded = same_scale(state, scalings, "scaling")
    state, wide, filled = same_rank(state, rank)
    if config.rslora:
        notes.append(f"rsLoRA's alpha / √rank is written as alpha / rank = {scaling:g}.")
    one = replace(
        config,
        rank=wide,
        alpha=scaling * wide,
        rslora=False,
        rank_pattern={},
        alpha_pattern={},
    )
    return replace(state, config=one), notes + folded + filled


def names(layer: StoredLayer) -> tuple[str, str]:
    """Return what A and B of a layer are called in a state's tensors."""
    return EMBEDDING if layer.is_embedding else LINEAR
