"""Low-rank products of segments: the compiled functions equal their formulas in torch."""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.closeness import assert_no_further
from veneer.kernels import segments
from veneer.kernels.segments import SegmentTable, SegmentUpdate
from veneer.lowrank.group import Group, Projection
from veneer.lowrank.masters import Masters
from veneer.lowrank.projection import (
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    shape_of_h,
)

# Rows of each adapter, and its ranks on three projections: 0 where it has none, and rows and ranks
# that no vector or tile divides. Rows behind the last segment are the base's own.
SEGMENTS = [(5, (3, 0, 17)), (1, (1, 2, 2)), (38, (8, 4, 1)), (0, (2, 2, 2)), (131, (5, 16, 4))]
ROWS = sum(rows for rows, _ in SEGMENTS) + 3
IN, OUTS = 83, (64, 150, 7)
Numbers = dict[str, list[Tensor | None]]


def group_of(dtype: torch.dtype) -> Group:
    """Return projections with random factors, of which some do not train, over frozen weights."""

    def own(out: int, number: int, segment: int, rank: int) -> Projection:
        A, B = torch.randn(rank, IN, dtype=wide) / IN**0.5, torch.randn(out, rank, dtype=wide)
        A.requires_grad_(segment != 2)
        B.requires_grad_((segment, number) != (4, 1))
        masters = Masters(A, B, 0.5 + segment)
        plain = Projection.plain(torch.empty(out, IN, dtype=dtype), None)
        return replace(
            plain, **dict(zip("AB", masters.rounded(dtype), strict=True)), masters=masters
        )

    wide = torch.promote_types(dtype, torch.float32)
    torch.manual_seed(0)
    projections = []
    for number, out in enumerate(OUTS):
        first, cut = 0, []
        for segment, (rows, ranks) in enumerate(SEGMENTS):
            cut.append((slice(first, first + rows), own(out, number, segment, ranks[number])))
            first += rows
        weight = (torch.randn(out, IN) / IN**0.5).to(dtype)
        projections.append(replace(Projection.plain(weight, None), segments=tuple(cut)))
    return Group(projections)


@torch.no_grad()
def products(group: Group, x: Tensor, dz: list[Tensor]) -> Numbers:
    h = torch.zeros(shape_of_h(group, ROWS), dtype=x.dtype)
    outputs = [torch.empty(ROWS, out, dtype=x.dtype) for out in OUTS]
    project(x, group, outputs, h)
    dh = gradient_of_h(dz, group)
    dx = gradient_of_x(dz, dh, group)
    none = [[None] * len(SEGMENTS)] * len(group)
    size = sum(rows * sum(ranks) for rows, ranks in SEGMENTS)
    return {
        "h": [h.flatten()[:size]],
        "outputs": list(outputs),
        "dh": [dh.flatten()[:size]],
        "dx": [dx],
        "gradients": gradients_of_trained(dz, none, dh, x, h, group),
    }


def in_float64(group: Group) -> Group:
    """Return the same projections in float64, whose factors are the rounded ones."""

    def wide(p: Projection) -> Projection:
        masters = p.masters
        if masters is not None:
            A, B = p.A.double(), p.B.double() / masters.factor
            A.requires_grad_(masters.A.requires_grad), B.requires_grad_(masters.B.requires_grad)
            masters = Masters(A, B, masters.factor)
        own = tuple((rows, wide(each)) for rows, each in p.segments)
        dense = {name: getattr(p, name).double() for name in ("weight", "A", "B")}
        return replace(p, **dense, masters=masters, segments=own)

    return Group(map(wide, group))


def compared(*of_all: Numbers) -> Iterator[tuple[str, list[Tensor]]]:
    for name in of_all[0]:
        for tensors in zip(*(each[name] for each in of_all), strict=True):
            assert len({tensor is None for tensor in tensors}) == 1, name
            if tensors[0] is not None:
                yield name, [tensor.detach() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_of_segments_equal_torch(dtype, monkeypatch):
    monkeypatch.setattr(segments, "_is_wide", lambda: True)
    group = group_of(dtype)
    x = torch.randn(ROWS, IN).to(dtype)
    # Not all of them lie row behind row, as gradients of heads do not.
    dz = [torch.randn(out, ROWS).T.to(dtype) for out in OUTS[:1]]
    dz += [torch.randn(ROWS, 2 * out)[:, :out].to(dtype) for out in OUTS[1:]]
    assert group.table(ROWS) is not None
    ours = products(group, x, dz)
    monkeypatch.setattr(segments, "kernel", lambda *_: None)
    by_torch = Group(group)
    assert by_torch.table(ROWS) is None
    theirs = products(by_torch, x, dz)
    exact = products(in_float64(group), x.double(), [d.double() for d in dz])
    # In float64 the peer is the reference, to which the order of a sum makes a difference.
    slack = (100 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    for name, (own, peer, expected) in compared(ours, theirs, exact):
        assert own.dtype == peer.dtype
        assert_no_further(own, peer, expected, name, slack=slack)


def test_a_segment_has_the_same_numbers_in_any_company_and_by_any_threads():
    # Over weights of 0: products of torch's may be split among threads in other ways.
    group = Group(replace(p, weight=torch.zeros_like(p.weight)) for p in group_of(torch.bfloat16))
    x = torch.randn(ROWS, IN).bfloat16()
    dz = [torch.randn(ROWS, out).bfloat16() for out in OUTS]
    before, threads = products(group, x, dz), torch.get_num_threads()
    # The second segment and the base's own rows: behind numbers of rows that no step divides.
    others = torch.ones(ROWS, dtype=torch.bool)
    others[SEGMENTS[0][0]], others[-3:] = False, False
    x[~others], dz[0][~others] = torch.nan, torch.inf
    torch.set_num_threads(3)
    try:
        after = products(group, x, dz)
    finally:
        torch.set_num_threads(threads)
    for name in ("outputs", "dx"):
        for one, other in zip(before[name], after[name], strict=True):
            assert torch.equal(one[others], other[others])
            assert not torch.equal(one[~others], other[~others])
    one, other = ([g for g in each["gradients"] if g is not None] for each in (before, after))
    differing = sum(not torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert differing == 2 * 3  # A and B of each projection on which the second segment acts
    assert len(one) > differing


def test_what_the_table_cannot_hold_or_is_slower_by_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(segments, "_is_wide", lambda: False)
    assert group_of(torch.float32).table(ROWS) is None
    group = group_of(torch.bfloat16)
    assert group.table(ROWS) is not None
    (rows, own), *others = group[0].segments
    strided = replace(own, A=own.A.T.contiguous().T)
    apart = replace(group[0], segments=((rows, strided), *others))
    assert Group([apart, *group[1:]]).table(ROWS) is None
    assert SegmentTable.of([]) is None


def test_what_projections_add_to_a_row_is_rounded_once():
    """Each of the three alone is less than half of what 1 differs by from the next number."""
    A, B = torch.ones(1, 40).bfloat16(), torch.ones(8, 1).bfloat16()
    table = SegmentTable.of([SegmentUpdate(0, 1, number, A, B, number, 3) for number in range(3)])
    assert table is not None
    x = torch.ones(1, 40).bfloat16()
    table.add(torch.full((1, 3), 3 * 2.0**-10).bfloat16(), [x] * 3, by_A=True)
    assert torch.equal(x, torch.full_like(x, 1 + 2.0**-7))


def test_a_table_refuses_what_it_would_misread():
    group = group_of(torch.bfloat16)
    table = group.table(ROWS)
    assert table is not None
    h = torch.zeros(shape_of_h(group, ROWS), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes no matrix of torch\.float32"):
        table.project([torch.zeros(ROWS, IN)] * len(group), h, by_A=True)
    outputs = [torch.zeros(out, ROWS).bfloat16().T for out in OUTS]
    with pytest.raises(ValueError, match=f"rows of stride {ROWS}"):
        table.add(h, outputs, by_A=False)


@pytest.mark.parametrize("alone", [True, False])
def test_what_a_group_holds_is_freed_with_it(alone):
    """At once, and not when the collector of cycles runs."""
    group = Group(p.segments[0][1] if alone else p for p in group_of(torch.bfloat16))
    held = weakref.ref(group[0].A)
    group.segments(ROWS)
    del group
    assert held() is None
