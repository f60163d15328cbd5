"""The changes ΔW = B A of an adapter's layers: from an AdapterState, and back into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.formats.fold import without_start
from veneer.formats.state import (
    BIAS,
    FACTORS,
    LAYER_KEYS,
    AdapterState,
    StoredLayer,
    layer_kind,
    lora_settings,
)
from veneer.formats.validate import finite_problems
from veneer.lowrank.formula import Factors

# Names of the tensors of an adapter that is a sum of matrices B A.
MATRIX_KEYS = LAYER_KEYS - {*FACTORS["parameter"], BIAS}


@dataclass(frozen=True)
class Change:
    """ΔW = B A of one layer, the scaling within B. A (rank, in), B (out, rank), float32."""

    A: Tensor
    B: Tensor
    is_embedding: bool = False

    @property
    def factors(self) -> Factors:
        return self.A, self.B

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, (dim, vocab) of an embedding."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class LayerFit:
    """How much of one layer's change its factors hold. norm: ‖ΔW‖. energy: the share of ‖ΔW‖²."""

    path: str
    rank: int
    norm: float
    energy: float


def energy_of(fits: Iterable[LayerFit]) -> float:
    """Return the energy over all layers: Σ energy ‖ΔW‖² / Σ ‖ΔW‖²."""
    fits = list(fits)
    whole = sum(fit.norm**2 for fit in fits)
    return sum(fit.energy * fit.norm**2 for fit in fits) / whole if whole else 1.0


def not_a_sum(state: AdapterState) -> list[str]:
    """Return why an adapter is no sum of B A over layers, judged by its tensors."""
    config = state.config
    if not isinstance(config, LoRA):
        return [f"it was made by {config.method}, and has no low-rank factors"]
    problems, complete = [], set()
    for layer in state.layers():
        complete.add(layer.path)
        rank = config.rank_of(layer.path)
        A, B = layer.A, layer.B
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
            problems.append(
                f"{layer.path} has A {tuple(A.shape)} and B {tuple(B.shape)}, but rank {rank}"
            )
    for key, tensor in state.tensors.items():
        path, _, name = key.rpartition(".")
        if name not in MATRIX_KEYS:
            problems.append(f"{key} is no tensor of a low-rank matrix")
        elif path not in complete:
            problems.append(f"{key} stands alone, without its other half")
        else:
            problems += finite_problems(key, tensor)
    if not complete:
        problems.append("it has no layers")
    return problems


def changes_of(state: AdapterState) -> dict[str, Change]:
    """Return what an adapter adds to each layer, by path; for DoRA, B A before it is rescaled.

    `not_a_sum` must have found nothing.
    """
    plain, _ = without_start(state)
    config = plain.config
    assert isinstance(config, LoRA)
    return {
        layer.path: Change(
            layer.A.to(torch.float32),
            layer.B.to(torch.float32) * config.scaling_of(layer.path),
            layer.is_embedding,
        )
        for layer in plain.layers()
    }


def state_of(
    changes: Mapping[str, Change],
    *,
    targets: Sequence[str],
    base_name: str,
    base_fingerprint: Mapping[str, str],
) -> AdapterState:
    """Return changes as an adapter with alpha = rank in each layer, so that the scaling is 1."""
    ranks = {path: len(change.A) for path, change in changes.items()}
    alphas = {path: float(rank) for path, rank in ranks.items()}
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        A, B = (factor.contiguous() for factor in change.factors)
        tensors |= StoredLayer(path, A, B, layer_kind(is_embedding=change.is_embedding)).tensors()
    return AdapterState(
        lora_settings(ranks, alphas, targets=targets),
        tensors,
        base_name=base_name,
        base_fingerprint=dict(base_fingerprint),
    )
