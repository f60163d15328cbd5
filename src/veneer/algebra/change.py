"""The changes ΔW = B A of an adapter's layers: from an AdapterState, and back into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.formats.fold import without_start
from veneer.formats.state import (
    BIAS,
    LAYER_KEYS,
    AdapterState,
    StoredLayer,
    lora_settings,
)
from veneer.formats.validate import finite_problems
from veneer.lowrank.formula import Factors
from veneer.models.description import FactorKind

# Names of the tensors of an adapter that is a sum of matrices B A.
MATRIX_KEYS = LAYER_KEYS - {BIAS}


@dataclass(frozen=True)
class Change:
    """ΔW = B A of one layer, the scaling within B. A (rank, in), B (out, rank), float32.

    Over a stack of experts, B (experts, out, rank), and A (experts, rank, in) or (rank, in) for
    all.
    """

    A: Tensor
    B: Tensor
    kind: FactorKind = "linear"

    @property
    def factors(self) -> Factors:
        return self.A, self.B

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def experts(self) -> int:
        """The number of experts in a stack, or 0."""
        return len(self.B) if self.B.ndim == 3 else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a linear layer, (dim, vocab) of an embedding, (experts, out, in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    def matrices(self) -> list[Change]:
        """Return the change of each expert of a stack; of another layer, the change itself."""
        if not self.experts:
            return [self]
        As = self.A.expand(self.experts, *self.A.shape[-2:])
        return [Change(A, B, self.kind) for A, B in zip(As, self.B, strict=True)]


@dataclass(frozen=True)
class LayerFit:
    """How much of one layer's change its factors hold. norm: ‖ΔW‖. energy: the share of ‖ΔW‖²."""

    path: str
    rank: int
    norm: float
    energy: float


def rejoined(
    path: str, matrices: Sequence[tuple[Factors, LayerFit]], *, experts: int, kind: FactorKind
) -> tuple[Change, LayerFit]:
    """Return a layer's one matrix, or those of its experts, as one change, and how much of it they
    hold. Experts of lower ranks are filled up with zeros; an A that all have is there once.
    """
    fits = [fit for _, fit in matrices]
    rank = max(fit.rank for fit in fits)
    norm = math.hypot(*(fit.norm for fit in fits))
    As = [F.pad(A, (0, 0, 0, rank - len(A))) for (A, _), _ in matrices]
    Bs = [F.pad(B, (0, rank - B.shape[1])) for (_, B), _ in matrices]
    is_shared = all(torch.equal(As[0], A) for A in As[1:])
    A = As[0] if is_shared else torch.stack(As)
    B = torch.stack(Bs) if experts else Bs[0]
    return Change(A, B, kind), LayerFit(path, rank, norm, energy_of(fits))


def rank_over(experts: int, rank: int | None, expert_rank: int | None) -> int | None:
    """Return the rank over each of a number of experts, or over a layer where that is 0."""
    if rank is None or not experts:
        return rank
    return expert_rank or max(1, rank // experts)


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
        matrices = A.ndim == B.ndim == 2
        if layer.kind == "parameter" and B.ndim == 3:  # a stack, with an A for each expert or one
            matrices = A.ndim == 2 or (A.ndim == 3 and len(A) == len(B))
        if not matrices or not A.shape[-2] == B.shape[-1] == rank:
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
            layer.kind,
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
    """Return changes as an adapter with alpha = rank in each layer, so that the scaling is 1.

    Experts have one A where those of each stack share it, for that is one setting of all stacks.
    """
    ranks = {path: change.rank for path, change in changes.items()}
    alphas = {path: float(rank) for path, rank in ranks.items()}
    stacks = [change for change in changes.values() if change.experts]
    shares = bool(stacks) and all(change.A.ndim == 2 for change in stacks)
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        A = change.A
        if change.experts and A.ndim == 2 and not shares:
            A = A.expand(change.experts, *A.shape)
        layer = StoredLayer(path, A.contiguous(), change.B.contiguous(), change.kind)
        tensors |= layer.tensors()
    config = lora_settings(ranks, alphas, targets=targets)
    return AdapterState(
        replace(config, shared_expert_a=shares),
        tensors,
        base_name=base_name,
        base_fingerprint=dict(base_fingerprint),
    )
