"""What TIES and DARE do to the entries of changes, against plain references and PEFT."""

import pytest
import torch
from peft.utils import merge_utils

from veneer.lowrank.sparse import agreed, dropped, pruned, threshold, trimmed


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_the_threshold_is_that_of_the_whole_vector_sorted(density, size):
    tensors = [size * noise(9, 11), size * noise(30, 2, seed=1) ** 3, torch.zeros(5, 5)]
    whole = torch.cat([tensor.flatten() for tensor in tensors]).abs().sort(descending=True).values
    expected = whole[max(1, int(density * len(whole))) - 1]
    assert threshold(lambda: iter(tensors), density) == float(expected)


def test_of_equal_entries_the_threshold_keeps_all():
    tensors = [torch.tensor([[1.0, -1.0, 1.0, 0.5]])]
    least = threshold(lambda: iter(tensors), 0.25)
    assert least == 1.0
    assert trimmed(tensors[0], least).tolist() == [[1.0, -1.0, 1.0, 0.0]]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_pruning_is_peft_s(density):
    change = noise(20, 30)
    torch.testing.assert_close(
        pruned(change, density), merge_utils.prune(change, density, "magnitude"), rtol=0, atol=0
    )


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dropping_is_peft_s_with_the_same_draw(density):
    change = noise(20, 30)
    mine = dropped(change, density, torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    torch.testing.assert_close(mine, merge_utils.prune(change, density, "random", rescale=True))


def test_what_is_dropped_comes_back_in_the_mean():
    change = noise(8, 8)
    draws = [dropped(change, 0.3, torch.Generator().manual_seed(i)) for i in range(3000)]
    mean = torch.stack(draws).mean(0)
    # The deviation of one draw is |x| √((1 − p) / p), that of the mean √3000 times less.
    assert bool(((mean - change).abs() < 5 * change.abs() * (0.7 / 0.3 / 3000) ** 0.5).all())


def test_agreeing_is_peft_s_where_no_total_is_zero():
    changes = [noise(20, 30, seed=s).where(noise(20, 30, seed=s + 9) > 0, 0.0) for s in range(3)]
    changes[0] += 0.01  # so that no total is zero
    ones = torch.ones(3)
    torch.testing.assert_close(agreed(changes), merge_utils.ties(changes, ones, 1.0))


def test_agreeing_entry_by_entry():
    one = torch.tensor([1.0, 1.0, -3.0, 0.0, 2.0, 0.0])
    two = torch.tensor([3.0, -2.0, 1.0, 4.0, -2.0, 0.0])
    assert agreed([one, two]).tolist() == [2.0, -2.0, -3.0, 4.0, 0.0, 0.0]
