"""The low-rank product W x + B A x over linear layers that share an input: forward and backward.

A single layer is a group of one (`linear.py`); the fused halves of a decoder layer call the same
functions with groups of several. Where adapters learn together, each acts on a segment of the
tokens: W x is one product for all of them. What each adapter adds has products of its own: those
of a group's table are one call (`kernels/segments.py`), and all others are made one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.dropout import Mask
from veneer.kernels.gain import apply_gain_, gain_backward
from veneer.lowrank.group import Group, Projection, Segment
from veneer.quant.weight import product, product_back

Gains = Sequence[Sequence[Tensor | None]]  # of each projection, of each of its segments, or of all


def shape_of_h(group: Group, tokens: int) -> tuple[int, int]:
    """Return the shape of a matrix with room for A x of all projections, segment after segment."""
    segments = group.segments(tokens)
    columns = max(segment.rank for segment in segments)
    numbers = sum(segment.tokens * segment.rank for segment in segments)
    return (tokens, columns) if len(segments) == 1 else (-(numbers // -max(columns, 1)), columns)


def _of_segments(h: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Return A x of each segment, (its tokens, Σ rank), from the matrix that holds all."""
    if len(segments) == 1:
        return [h[: segments[0].tokens]]
    sizes = [segment.tokens * segment.rank for segment in segments]
    pieces = h.flatten()[: sum(sizes)].split_with_sizes(sizes)
    return [
        piece.view(segment.tokens, segment.rank)
        for piece, segment in zip(pieces, segments, strict=True)
    ]


def project(
    x: Tensor,
    group: Group,
    outputs: Sequence[Tensor],
    h: Tensor,
) -> None:
    """Write gain ∘ (W x + B A x) + b of each projection to `outputs`, (tokens, out), and A x of all
    side by side to `h`, which has `shape_of_h`: (tokens, Σ rank), with 0 where it does not act.
    x (tokens, in)."""
    segments = group.segments(len(x))
    table = group.table(len(x))
    if table is not None:
        table.project([x] * len(group), h, by_A=True)
    adapted = []
    for segment, own_h in zip(segments, _of_segments(h, segments), strict=True):
        if segment.rank or len(segments) == 1:
            if not segment.in_table:
                _write_h(x[segment.rows], segment.group, own_h)
            adapted.append((segment, _columns(own_h, segment.group)))
    for p, y in zip(group, outputs, strict=True):
        _base_product(x, p, y)
    if table is not None:
        table.add(h, outputs, by_A=False)
    for number, y in enumerate(outputs):
        for segment, columns in adapted:
            p = segment.group[number]
            if not segment.in_table:
                _add_update(columns[number], p, y[segment.rows])
            elif p.gain is not None:
                apply_gain_(y[segment.rows], p.gain, p.bias)


def _write_h(x: Tensor, group: Sequence[Projection], h: Tensor) -> None:
    if _are_masked(group):
        for ranks, A, mask in _by_mask(group):
            torch.mm(x if mask is None else mask.apply(x), A.T, out=h[:, ranks])
    else:
        torch.mm(x, _stacked_A(group).T, out=h)
    for p, own_h in zip(group, _columns(h, group), strict=True):
        if p.acts_on is not None:
            own_h *= p.acts_on


def _add_update(h: Tensor, p: Projection, y: Tensor) -> None:
    """Make gain ∘ (y + B h) + b of y = W x + b."""
    if p.rank and p.gain is not None and choice.uses_triton(y, h, p.B, p.gain, p.bias):
        from veneer.kernels.triton_gain import add_with_gain

        add_with_gain(y, h, p.B, p.gain, p.bias)
        return
    if p.rank:
        y.addmm_(h, p.B.T)
    if p.gain is not None:
        apply_gain_(y, p.gain, p.bias)


def through_gains(
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    group: Group,
    *,
    in_place: bool,
) -> tuple[list[Tensor], Gains]:
    """Return the gradients dz of z = W x + B A x, (tokens, out) each, and those of the gains.

    outputs: what `project` wrote; read only where there is a gain. With `in_place`, dz may be
    written over `d_outputs`.
    """
    pairs = [
        _through_gain(dy, y, p, in_place=in_place)
        for dy, y, p in zip(d_outputs, outputs, group, strict=True)
    ]
    return [dz for dz, _ in pairs], [d_gains for _, d_gains in pairs]


def _through_gain(
    dy: Tensor, y: Tensor, p: Projection, *, in_place: bool
) -> tuple[Tensor, list[Tensor | None]]:
    if not p.has_gain:
        return dy, [None] * max(1, len(p.segments))
    if p.gain is not None:
        dz, d_gain = gain_backward(dy, y, p.gain, p.bias, in_place=in_place)
        return dz, [d_gain]
    dz = dy if in_place else dy.clone()
    d_gains: list[Tensor | None] = []
    for rows, own in p.segments:
        if own.gain is None:
            d_gains.append(None)
            continue
        before = dz[rows]
        through, of_gain = gain_backward(before, y[rows], own.gain, own.bias, in_place=True)
        if through is not before:
            before.copy_(through)
        d_gains.append(of_gain)
    return dz, d_gains


def gradient_of_h(dz: Sequence[Tensor], group: Group) -> Tensor:
    """Return dh = dz B of every projection side by side, with 0 where it does not act; it lies as h
    does."""
    tokens = len(dz[0])
    segments, table = group.segments(tokens), group.table(tokens)
    if len(segments) == 1:
        return _gradient_of_h(dz, segments[0])
    dh = segments[0].group[0].A.new_empty(shape_of_h(group, tokens))
    if table is not None:
        table.project(dz, dh, by_A=False)
    for segment, own_dh in zip(segments, _of_segments(dh, segments), strict=True):
        if segment.rank and not segment.in_table:
            own_dh.copy_(_gradient_of_h(dz, segment))
    return dh


def _gradient_of_h(dz: Sequence[Tensor], segment: Segment) -> Tensor:
    pairs = zip(dz, segment.group, strict=True)
    return _joined([_own(d[segment.rows] @ p.B, p) for d, p in pairs], dim=1)


def _own(h: Tensor, p: Projection) -> Tensor:
    """Return A x, or its gradient, with 0 where a projection's update does not act."""
    return h if p.acts_on is None else h * p.acts_on


def gradient_of_x(dz: Sequence[Tensor], dh: Tensor, group: Group) -> Tensor:
    """Return dx = Σ (dz W) + dh A, (tokens, in), where each adapter's dh A has its mask."""
    dx = product_back(dz[0], group[0].weight)
    for d, p in zip(dz[1:], group[1:], strict=True):
        if isinstance(p.weight, Tensor):
            dx.addmm_(d, p.weight)
        else:
            dx += product_back(d, p.weight)
    segments, table = group.segments(len(dx)), group.table(len(dx))
    if table is not None:
        table.add(dh, [dx] * len(group), by_A=True)
    for segment, own_dh in zip(segments, _of_segments(dh, segments), strict=True):
        if segment.rank and not segment.in_table:
            _add_through_A(dx[segment.rows], own_dh, segment.group)
    return dx


def _add_through_A(dx: Tensor, dh: Tensor, group: Sequence[Projection]) -> None:
    if not _are_masked(group):
        dx.addmm_(dh, _stacked_A(group))
        return
    for ranks, A, mask in _by_mask(group):
        if mask is None:
            dx.addmm_(dh[:, ranks], A)
        else:
            mask.add_(dx, dh[:, ranks] @ A)


def gradients_of_trained(
    dz: Sequence[Tensor],
    d_gains: Gains,
    dh: Tensor,
    x: Tensor,
    h: Tensor,
    group: Group,
) -> list[Tensor | None]:
    """Return dA = dhᵀ (x ∘ mask), dB = dzᵀ h and the gain's gradient of every projection, in the
    order of `trained`; None for an A or B that does not train."""
    segments = group.segments(len(x))
    of_projections: list[list[Tensor | None]] = [[] for _ in group]
    table = group.table(len(x))
    of_table = iter(() if table is None else table.gradients(dh, x, h, dz))
    for number, (segment, own_dh, own_h) in enumerate(
        zip(segments, _of_segments(dh, segments), _of_segments(h, segments), strict=True)
    ):
        if not segment.rank:
            continue
        rows = segment.rows
        if segment.in_table:
            for p, of_gains, gradients in zip(segment.group, d_gains, of_projections, strict=True):
                if p.rank:
                    gradients += [
                        None if gradient is None else gradient.to(weight.dtype)
                        for gradient, weight in zip(next(of_table), p.trained()[:2], strict=True)
                    ]
                if p.gain is not None:
                    gradients.append(of_gains[number])
            continue
        dAs = _gradients_of_A(own_dh, x[rows], segment.group)
        columns = _columns(own_h, segment.group)
        for own, d, dA, own_column, of_gains, gradients in zip(
            *(segment.group, dz, dAs, columns, d_gains, of_projections), strict=True
        ):
            if trained := own.trained():
                dB = d[rows].T @ own_column if trained[1].requires_grad else None
                gradients += [dA, dB] if own.masters is None else own.masters.gradients(dA, dB)
            if own.gain is not None:
                gradients.append(of_gains[number])
    return [gradient for gradients in of_projections for gradient in gradients]


def _base_product(x: Tensor, p: Projection, out: Tensor) -> None:
    """Write W x + b to `out`, by the operations of the base's own linear layer."""
    bias = None if p.bias is None else p.bias.to(x.dtype)
    if not isinstance(p.weight, Tensor):
        product(x, p.weight, out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, p.weight.to(x.dtype).T, out=out)
    else:
        torch.addmm(bias, x, p.weight.to(x.dtype).T, out=out)


def _gradients_of_A(dh: Tensor, x: Tensor, group: Sequence[Projection]) -> Sequence[Tensor | None]:
    """Return dhᵀ (x ∘ mask) of each projection, (rank, in); all None where no A trains."""
    if not any(A.requires_grad for A, *_ in filter(None, (p.trained() for p in group))):
        return [None] * len(group)
    return _gradient_of_A(dh, x, group).split_with_sizes([p.rank for p in group])


def _gradient_of_A(dh: Tensor, x: Tensor, group: Sequence[Projection]) -> Tensor:
    """Return dhᵀ (x ∘ mask) of all adapters, (Σ rank, in)."""
    if not _are_masked(group):
        return dh.T @ x
    dA = x.new_empty(dh.shape[1], x.shape[1])
    for ranks, _, mask in _by_mask(group):
        torch.mm(dh[:, ranks].T, x if mask is None else mask.apply(x), out=dA[ranks])
    return dA


def _are_masked(group: Sequence[Projection]) -> bool:
    return any(p.masks for p in group)


def _by_mask(group: Sequence[Projection]) -> Iterator[tuple[slice, Tensor, Mask | None]]:
    """Yield which of Σ rank belong to each adapter, its A (rank, in) and its mask."""
    start = 0
    for p in group:
        masks = p.masks or ((p.rank, None),)
        for (rank, mask), A in zip(masks, p.A.split([rank for rank, _ in masks]), strict=True):
            if rank:
                yield slice(start, start + rank), A, mask
            start += rank


def _columns(h: Tensor, group: Sequence[Projection]) -> Sequence[Tensor]:
    """Return each projection's part of h (tokens, Σ rank)."""
    return [h] if len(group) == 1 else h.split_with_sizes([p.rank for p in group], 1)


def _stacked_A(group: Sequence[Projection]) -> Tensor:
    return _joined([p.A for p in group], dim=0)  # (Σ rank, in)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
