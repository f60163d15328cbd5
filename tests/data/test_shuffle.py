"""The order of very many rows: a permutation that is made piece by piece."""

import numpy as np
import pytest

from veneer.data import packing, shuffle
from veneer.data.packing import StepOrder, held_out_rows, split_held_out
from veneer.data.shuffle import Shuffled


@pytest.fixture
def in_pieces(monkeypatch):
    """Treat more than a hundred rows as very many."""
    monkeypatch.setattr(shuffle, "WHOLE", 100)
    monkeypatch.setattr(packing, "WHOLE", 100)
    monkeypatch.setattr(packing, "SECTION", 250)


def test_few_rows_are_in_numpys_order():
    expected = np.random.default_rng(np.random.SeedSequence([3, 1])).permutation(50)
    assert Shuffled(50, (3, 1)).between(0, 50).tolist() == expected.tolist()
    train, held_out = split_held_out(50, eval_rows=7, seed=4)
    order = np.random.default_rng(4).permutation(50)
    assert (train, held_out) == (sorted(order[7:]), sorted(order[:7]))


@pytest.mark.parametrize("n", [101, 128, 129, 1000, 4097])
def test_many_rows_come_once_each_whatever_the_pieces(in_pieces, n):
    shuffled = Shuffled(n, (0, 5))
    whole = shuffled.between(0, n)
    assert sorted(whole) == list(range(n))
    pieces = [shuffled.between(start, start + 37) for start in range(0, n, 37)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert whole.tolist() != Shuffled(n, (0, 6)).between(0, n).tolist()


def test_the_order_of_many_rows_looks_random():
    """Neighbours are as far apart, and places as little like numbers, as in numpy's order."""
    n = shuffle.WHOLE + 1
    order = Shuffled(n, (0, 0)).between(0, 20_000) / n
    assert abs(order.mean() - 0.5) < 0.01
    assert abs(np.abs(np.diff(order)).mean() - 1 / 3) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert np.histogram(order, 16, (0, 1))[0].std() < 3 * (20_000 / 16) ** 0.5


def test_an_epoch_of_many_rows_is_made_as_it_goes(in_pieces, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 30, 1000).astype(np.int32)
    order = StepOrder(lengths, 60, 40, seed=1)
    made = []
    part = Shuffled.between
    monkeypatch.setattr(Shuffled, "between", lambda *a: made.append(a[1:]) or part(*a))
    epoch = order.epoch(0)
    first = epoch[0]
    assert made == [(0, 250)]
    assert epoch.has(1)
    assert made == [(0, 250)]
    steps = list(epoch)
    assert steps[0] == first
    assert len(steps) == len(epoch)
    assert not epoch.has(len(epoch))
    assert sorted(i for step in steps for batch in step for i in batch) == list(range(1000))
    assert max(sum(lengths[i] for b in step for i in b) for step in steps) <= 60
    assert abs(order.steps(2.5) / (2.5 * len(epoch)) - 1) < 0.1
    assert steps == list(StepOrder(lengths, 60, 40, seed=1).epoch(0))


def test_rows_held_out_of_many_need_no_order_of_all(in_pieces, monkeypatch):
    made = []
    part = Shuffled.between
    monkeypatch.setattr(Shuffled, "between", lambda *a: made.append(a[1:]) or part(*a))
    rows = held_out_rows(5000, eval_rows=20, seed=2)
    assert made == [(0, 20)]
    assert len(set(rows.tolist())) == 20
    assert sorted(rows) == rows.tolist()
