"""Adapters of the projections in a stack of experts, as one adapter of the stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.lowrank.formula import Factors


def as_one(projections: Sequence[Factors]) -> Factors:
    """Return A and B of a stack whose rows are those of several projections in turn.

    Each has A (experts, rank, in) and B (experts, out, rank), and no two ranks need be equal. With
    one A for all, the stack has it too. Otherwise its A has all of theirs below each other, and its
    B theirs as blocks on the diagonal.
    """
    first, *others = [A for A, _ in projections]
    if not first.is_meta and all(torch.equal(first, A) for A in others):
        return first, torch.cat([B for _, B in projections], dim=-2)
    A = torch.cat([first, *others], dim=-2)
    rows, column = [], 0
    for own, B in projections:
        row = B.new_zeros(*B.shape[:-1], A.shape[-2])
        row[..., column : column + own.shape[-2]] = B
        rows.append(row)
        column += own.shape[-2]
    return A, torch.cat(rows, dim=-2)
