"""Masks of dropout: the kernel equals its formula in torch, and the masks are random."""

import itertools

import pytest
import torch

from veneer.kernels import dropout
from veneer.kernels.dropout import Mask

COLUMNS = (1, 2, 33, 2500)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def ones(mask: Mask, rows: int = 512, columns: int = 512) -> torch.Tensor:
    return mask.apply(torch.ones(rows, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_kernel_equals_its_formula_to_the_bit(seed, dtype, monkeypatch):
    mask = Mask(0.3, seed)
    shapes = [(rows, columns) for columns in COLUMNS for rows in (1, 40)]
    cases = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in shapes]

    def results() -> list[torch.Tensor]:
        return [
            result
            for x, y in cases
            for result in (mask.apply(x), mask.apply_(x.clone()), mask.add_(y.clone(), x))
        ]

    compiled = results()
    monkeypatch.setattr(dropout, "kernel", lambda *_, **__: None)
    assert all(map(torch.equal, compiled, results()))
    assert all(
        torch.equal(m, x * ones(mask, *x.shape).to(dtype))
        for m, (x, _) in zip(compiled[::3], cases, strict=True)
    )


def test_the_number_of_threads_changes_nothing():
    x, threads = torch.randn(300, 500), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(Mask(0.5, 3).apply(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_as_many_elements_are_dropped_as_asked_for(p):
    kept = ones(Mask(p, 5))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 4 * deviation
    assert abs(float(kept.mean() * Mask(p, 5).scale) - 1) < 4 * deviation / (1 - p) + 2**-16
    by_row_and_column = torch.cat([kept.mean(0), kept.mean(1)])
    assert (by_row_and_column - (1 - p)).abs().max() < 5 * (p * (1 - p) / 512) ** 0.5


def test_masks_are_independent_of_each_other_and_of_their_shifts():
    """Seeds, and an element and its neighbours, correlate by chance alone."""
    masks = [ones(Mask(0.5, seed)) - 0.5 for seed in (0, 1, 2, 2**32, 2**61)]
    pairs = [(a, b) for a, b in itertools.combinations(masks, 2)]
    shifts = [(down, right) for down in range(4) for right in range(5) if down or right]
    pairs += [(masks[1], masks[1].roll(shift, (0, 1))) for shift in shifts]
    pairs += [(masks[0], masks[1].roll(shift, (0, 1))) for shift in shifts]
    pairs += [(masks[0], masks[0].T)]
    correlations = torch.stack([(a * b).mean() * 4 for a, b in pairs])
    assert correlations.abs().max() < 5 / 512


def test_seeds_come_from_torch_s_generator():
    torch.manual_seed(1)
    first = [Mask.drawn(0.1) for _ in range(3)]
    assert len(set(first)) == 3
    torch.manual_seed(1)
    assert [Mask.drawn(0.1) for _ in range(3)] == first


def test_nearly_everything_and_nearly_nothing_can_be_dropped():
    assert ones(Mask(1e-9, 0)).all()
    assert ones(Mask(1 - 1e-9, 0)).sum() < 50
