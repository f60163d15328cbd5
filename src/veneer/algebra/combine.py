"""Combine adapters into one: their weighted sum, exact or cut to a rank, TIES and DARE."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.algebra.change import (
    Change,
    LayerFit,
    changes_of,
    energy_of,
    not_a_sum,
    rank_over,
    rejoined,
    state_of,
)
from veneer.algebra.config import CombineConfig, CombineMethod
from veneer.errors import AdapterError, ConfigError, joined
from veneer.formats.contents import has_invocation
from veneer.formats.state import AdapterState
from veneer.formats.training import base_in
from veneer.lowrank.formula import Factors, delta_weight
from veneer.lowrank.sparse import agreed, dropped, pruned, threshold, trimmed
from veneer.lowrank.spectrum import balanced, inner, kept_energy, product_directions, truncated

Changes = Mapping[str, Change]  # of one adapter, by path, with its weight in B


@dataclass(frozen=True)
class Combined:
    """One adapter made of several, how much of the sum it holds, and notices."""

    state: AdapterState
    layers: tuple[LayerFit, ...]
    notices: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """The share of ‖ΔW‖² over all layers that the rank holds; 1 for an exact sum."""
        return energy_of(self.layers)


def combine(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    *,
    method: CombineMethod = "sum",
    rank: int | None = None,
    expert_rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combined:
    """Return Σ w ΔW of several adapters over one base as one adapter; a negative w takes one away.

    sum: exact, with A stacked and B side by side, so that ranks add up.
    svd: the nearest to the sum at a rank, from the factors alone.
    The others make w ΔW for one layer at a time, and cut their result to a rank:
    ties: each keeps the largest `density` of all its entries; then, entry by entry, the mean of
    those with the sign of their sum (Yadav et al. 2023, section 3).
    dare: each keeps a random `density` of its entries, divided by it; then the sum (Yu et al. 2023,
    section 3.2). dare_ties: the same, then the mean of those that agree, as in ties.
    magnitude_prune: each keeps the largest `density` of each layer's entries; then the sum.

    A layer that an adapter lacks counts as zero. Raises ConfigError for impossible settings, and
    AdapterError, listing everything at once, for adapters of different bases, of other methods or
    with new tokens, and for DoRA.
    """
    config = CombineConfig(method, rank, expert_rank, density, seed)
    _check_weights(weights, len(states))
    _check_states(states)
    adapters = [
        {path: Change(c.A, weight * c.B, c.kind) for path, c in changes_of(state).items()}
        for state, weight in zip(states, weights, strict=True)
    ]
    _check_shapes(adapters)
    if method in ("sum", "svd"):
        combined = dict(_summed(adapters, config))
    else:
        combined = dict(_sparse(adapters, config))
    state = state_of(
        {path: change for path, (change, _) in combined.items()},
        targets=_targets(states, list(combined)),
        base_name=next((s.base_name for s in states if s.base_name), ""),
        base_fingerprint={key: mark for s in states for key, mark in s.base_fingerprint.items()},
    )
    # Loading the adapter checks that they equal the base's own.
    base_weights = {name: weight for s in states for name, weight in s.base_weights.items()}
    state = replace(state, base_weights=base_weights, training=_common_training(states))
    return Combined(state, tuple(fit for _, fit in combined.values()), tuple(_notices(states)))


def _summed(
    adapters: Sequence[Changes], config: CombineConfig
) -> Iterator[tuple[str, tuple[Change, LayerFit]]]:
    """Yield the sum of each layer's changes, cut to a rank if there is one."""
    for path, changes in _by_layer(adapters):
        rank = rank_over(changes[0].experts, config.rank, config.expert_rank)
        matrices = zip(*(change.matrices() for change in changes), strict=True)
        sums = [_sum(path, matrix, rank) for matrix in matrices]
        yield path, rejoined(path, sums, experts=changes[0].experts, kind=changes[0].kind)


def _sum(path: str, changes: Sequence[Change], rank: int | None) -> tuple[Factors, LayerFit]:
    A = torch.cat([change.A for change in changes])  # (Σ rank, in)
    B = torch.cat([change.B for change in changes], dim=1)  # (out, Σ rank)
    energy, norm = 1.0, math.sqrt(max(0.0, inner((A, B), (A, B))))
    if rank is not None:
        U, S, V = product_directions(A, B)
        A, B = balanced(U, S, V, rank)
        energy = kept_energy(S[:rank], float(S.square().sum()))
    return (A, B), LayerFit(path, len(A), norm, energy)


def _sparse(
    adapters: Sequence[Changes], config: CombineConfig
) -> Iterator[tuple[str, tuple[Change, LayerFit]]]:
    """Yield each layer's changes, made sparse and summed, cut to the rank."""
    density = config.density
    assert density is not None
    least = [0.0] * len(adapters)
    if config.method == "ties":
        # The paper trims an adapter as one vector: a layer that changed little may lose everything.
        least = [threshold(partial(_all_dense, adapter), density) for adapter in adapters]
    for path, changes in _by_layer(adapters):
        generator = torch.Generator().manual_seed(_layer_seed(config.seed, path))
        thresholds = [x for adapter, x in zip(adapters, least, strict=True) if path in adapter]
        rank = rank_over(changes[0].experts, config.rank, config.expert_rank)
        cut = []
        for matrices in zip(*(change.matrices() for change in changes), strict=True):
            sparse = []
            for change, smallest in zip(map(_dense, matrices), thresholds, strict=True):
                if config.method == "ties":
                    sparse.append(trimmed(change, smallest))
                elif config.method == "magnitude_prune":
                    sparse.append(pruned(change, density))
                else:
                    sparse.append(dropped(change, density, generator))
            agree = config.method in ("ties", "dare_ties")
            total = agreed(sparse) if agree else torch.stack(sparse).sum(0)
            factors, energy = truncated(total, rank=rank)
            cut.append((factors, LayerFit(path, len(factors[0]), float(total.norm()), energy)))
        yield path, rejoined(path, cut, experts=changes[0].experts, kind=changes[0].kind)


def _by_layer(adapters: Sequence[Changes]) -> Iterator[tuple[str, list[Change]]]:
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        yield path, [adapter[path] for adapter in adapters if path in adapter]


def _dense(change: Change) -> Tensor:
    return delta_weight(change.A, change.B, 1.0)


def _all_dense(adapter: Changes) -> Iterator[Tensor]:
    return (_dense(matrix) for change in adapter.values() for matrix in change.matrices())


def _layer_seed(seed: int, path: str) -> int:
    """Return a layer's own seed, so that its draw does not depend on other layers."""
    return int(hashlib.sha256(f"{seed} {path}".encode()).hexdigest()[:15], 16)


def _targets(states: Sequence[AdapterState], paths: list[str]) -> list[str]:
    """Return targets for the layers of all adapters and no others."""
    configs = [state.config for state in states if isinstance(state.config, LoRA)]
    if any(config.layers is not None for config in configs):
        return paths
    return list(dict.fromkeys(target for config in configs for target in config.targets))


def _check_weights(weights: Sequence[float], count: int) -> None:
    problems = [
        f"weight {n} is {weight!r}, but must be a finite number other than 0"
        for n, weight in enumerate(weights, 1)
        if not weight or not math.isfinite(weight)
    ]
    if len(weights) != count:
        problems.append(f"there are {count} adapters, but {len(weights)} weights")
    if not count:
        problems.append("there is no adapter")
    if problems:
        raise ConfigError(f"Adapters cannot be combined so: {joined(problems)}.")


def _check_states(states: Sequence[AdapterState]) -> None:
    """Raise AdapterError for adapters that are no sums of B A, or of different bases."""
    problems = []
    marks: dict[str, tuple[int, str]] = {}
    for n, state in enumerate(states, 1):
        own = not_a_sum(state)
        if isinstance(state.config, LoRA) and state.config.dora:
            own.append(
                "it is DoRA, whose change m ∘ (W + B A) / ‖W + B A‖ − W depends on the base and "
                "is of full rank, so that no factors hold it (merge it, and extract an adapter "
                "from the merged model)"
            )
        if has_invocation(state):
            own.append("it acts from an invocation on, and what is combined on all tokens")
        if state.new_tokens is not None:
            own.append("it has new tokens, whose rows belong to its own tokenizer")
        if state.modules_to_save or state.trained_tokens:
            own.append("it has weights or rows that replace the base's, which are no B A")
        for key, mark in state.base_fingerprint.items():
            first, first_mark = marks.setdefault(key, (n, mark))
            if first_mark != mark:
                own.append(f"it was made on another base than adapter {first} (its {key} differ)")
        problems += [f"adapter {n}: {problem}" for problem in own]
    if problems:
        raise AdapterError(f"These adapters cannot be combined: {joined(problems)}.")


def _check_shapes(adapters: Sequence[Changes]) -> None:
    problems = []
    for path, changes in _by_layer(adapters):
        kinds = {(change.shape, change.kind) for change in changes}
        if len(kinds) > 1:
            shapes = " and ".join(str(change.shape) for change in changes)
            problems.append(f"{path} is {shapes}")
    if problems:
        raise AdapterError(
            f"These adapters belong to bases of different shapes: {joined(problems)}."
        )


def _common_training(states: Sequence[AdapterState]) -> dict[str, Any]:
    """Return what the base was computed in and the system prompt, where they are all the same."""
    first = states[0].training
    return {
        key: first[key]
        for key in ("base", "system")
        if key in first and all(state.training.get(key) == first[key] for state in states)
    }


def _notices(states: Sequence[AdapterState]) -> Iterator[str]:
    names = sorted({state.base_name for state in states if state.base_name})
    if len(names) > 1 and not all(state.base_fingerprint for state in states):
        yield (
            f"Only the shapes of these adapters show that they belong to one base: they name "
            f"{', '.join(names)}."
        )
    bases = [base for state in states if (base := base_in(state.training))]
    if len({base.quantization for base in bases}) > 1:
        yield f"They were trained over their base in {' and '.join(map(str, bases))}."
    for n, state in enumerate(states, 1):
        if state.base_weights:
            yield (
                f"Adapter {n} has weights of its base too ({', '.join(state.base_weights)}); they "
                "are taken to be the base's own and are not summed."
            )
