"""What an adapter adds to each layer, apart from how its file says it, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.formats.parts import EMBEDDING, LINEAR, MAGNITUDE, START
from veneer.formats.peft.directory import without_start
from veneer.formats.state import AdapterState
from veneer.formats.validate import is_finite
from veneer.lowrank.formula import Factors

KINDS = (*LINEAR, *EMBEDDING, MAGNITUDE, *START)


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
        """(out, in) of a linear layer, (dim, words) of an embedding."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class LayerFit:
    """How much of a change ‖ΔW‖ the factors of one layer hold: `energy` is a share of ‖ΔW‖²."""

    path: str
    rank: int
    norm: float
    energy: float


def energy_of(fits: Iterable[LayerFit]) -> float:
    """Return the energy that is kept over all layers: Σ energy ‖ΔW‖² / Σ ‖ΔW‖²."""
    fits = list(fits)
    whole = sum(fit.norm**2 for fit in fits)
    return sum(fit.energy * fit.norm**2 for fit in fits) / whole if whole else 1.0


def unfit(state: AdapterState) -> list[str]:
    """Return why an adapter is no sum of B A over layers, as far as its tensors can tell."""
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
        path, _, kind = key.rpartition(".")
        if kind not in KINDS:
            problems.append(f"{key} is no part of a low-rank layer")
        elif path not in complete:
            problems.append(f"{key} stands alone, without its other half")
        elif not is_finite(tensor):
            problems.append(f"{key} has values that are not finite numbers of a sensible size")
    if not complete:
        problems.append("it has no layers")
    return problems


def changes_of(state: AdapterState) -> dict[str, Change]:
    """Return what an adapter adds to each layer, by path; of DoRA, B A before it is rescaled.

    The adapter must have passed `unfit`.
    """
    plain = without_start(state)
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
    """Return changes as an adapter whose alpha is its rank in each layer, so that scaling is 1."""
    ranks = {path: len(change.A) for path, change in changes.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {path: own for path, own in ranks.items() if own != rank}
    config = LoRA(
        rank=rank,
        alpha=float(rank),
        targets=targets,
        rank_pattern=others,
        alpha_pattern={path: float(own) for path, own in others.items()},
    )
    tensors = {}
    for path, change in changes.items():
        names = EMBEDDING if change.is_embedding else LINEAR
        for name, factor in zip(names, change.factors, strict=True):
            tensors[f"{path}.{name}"] = factor.contiguous()
    return AdapterState(
        config, tensors, base_name=base_name, base_fingerprint=dict(base_fingerprint)
    )
