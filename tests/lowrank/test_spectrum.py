"""Singular values of products and of weights, against float64 decompositions of the whole."""

import math

import pytest
import torch

from veneer.lowrank.spectrum import (
    balanced,
    effective_rank,
    inner,
    kept_energy,
    product_directions,
    rank_for,
    truncated,
)

SHAPES = [(4, 20, 30), (4, 30, 20), (25, 20, 30), (40, 20, 30), (1, 7, 5)]  # rank, out, in


def factors(rank: int, out: int, in_: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, in_, generator=g), torch.randn(out, rank, generator=g)


@pytest.mark.parametrize(("rank", "out", "in_"), SHAPES)
def test_directions_of_a_product_are_those_of_the_whole(rank, out, in_):
    A, B = factors(rank, out, in_)
    whole = B.double() @ A.double()
    U, S, V = product_directions(A, B)
    expected = torch.linalg.svdvals(whole)
    count = min(rank, out, in_)
    assert S.shape == (count,)
    torch.testing.assert_close(S, expected[:count], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(U @ S.diag() @ V.T, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(U.T @ U, torch.eye(count).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(V.T @ V, torch.eye(count).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rank", "out", "in_"), SHAPES)
def test_a_cut_product_errs_by_the_discarded_singular_values(rank, out, in_):
    A, B = factors(rank, out, in_)
    whole = B.double() @ A.double()
    expected = torch.linalg.svdvals(whole)
    directions = product_directions(A, B)
    for kept in range(1, rank + 1):
        A1, B1 = balanced(*directions, kept)
        error = float((whole - B1.double() @ A1.double()).norm())
        assert error == pytest.approx(
            float(expected[kept:].norm()), abs=1e-5 * float(expected.norm())
        )
        S = directions[1]
        share = float(expected[:kept].square().sum() / expected.square().sum())
        assert kept_energy(S[:kept], float(whole.square().sum())) == pytest.approx(share)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("rank", [1, 5, 30, 99])
def test_the_nearest_of_a_rank_errs_by_the_discarded_singular_values(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.svdvals(weight.double())
    (A, B), energy = truncated(weight, rank=rank)
    assert A.shape == (min(rank, *shape), shape[1])
    assert B.shape == (shape[0], min(rank, *shape))
    error = float((weight - B @ A).double().norm())
    assert error == pytest.approx(float(expected[rank:].norm()), abs=1e-5 * float(expected.norm()))
    share = float(expected[:rank].square().sum() / expected.square().sum())
    assert energy == pytest.approx(share, abs=1e-6)
    # Both factors are of one size, so that neither loses more when it is rounded.
    torch.testing.assert_close(A.norm(), B.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_an_energy_takes_the_smallest_rank_that_keeps_it(energy):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    squares = torch.linalg.svdvals(weight.double()).square()
    shares = squares.cumsum(0) / squares.sum()
    (A, _), kept = truncated(weight, energy=energy)
    assert kept >= energy - 1e-6
    assert kept == pytest.approx(float(shares[len(A) - 1]), abs=1e-6)
    assert len(A) == 1 or float(shares[len(A) - 2]) < energy


def test_nothing_keeps_all_of_its_energy():
    (A, B), energy = truncated(torch.zeros(6, 8), rank=2)
    assert energy == 1.0
    assert not (B @ A).any()
    assert truncated(torch.zeros(6, 8), energy=0.5)[1] == 1.0
    assert effective_rank(torch.zeros(3)) == 0.0


def test_rank_for_counts_at_least_one_and_at_most_all():
    S = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for(S, e) for e in (1e-9, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_singular_values_have_an_effective_rank_of_their_number(count):
    S = torch.zeros(8)
    S[:count] = 3.5
    assert effective_rank(S) == pytest.approx(count)
    assert effective_rank(7 * S) == pytest.approx(effective_rank(S))


def test_the_effective_rank_is_that_of_the_paper_s_formula():
    S = [4.0, 2.0, 1.0, 1.0]
    p = [value / 8 for value in S]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert effective_rank(torch.tensor(S)) == pytest.approx(expected)


@pytest.mark.parametrize(("rank", "out", "in_"), SHAPES)
def test_inner_products_from_factors_are_those_of_the_whole(rank, out, in_):
    one, other = factors(rank, out, in_), factors(3, out, in_, seed=9)
    whole, whole2 = (B.double() @ A.double() for A, B in (one, other))
    assert inner(one, other) == pytest.approx(float((whole * whole2).sum()))
    assert inner(one, one) == pytest.approx(float(whole.square().sum()))
