"""Which factors act on which row: by places in memory, and by numbers that come later."""

import torch

from veneer.lowrank.update import LowRankUpdate, RowUpdates


def update(rank: int, *, gain: bool = False) -> LowRankUpdate:
    A, Bt = torch.randn(rank, 6), torch.randn(rank, 5)  # B as the adapter cache keeps it
    return LowRankUpdate(A, Bt.mT, torch.rand(5) if gain else None)


MIXES = [{"q": update(2), "k": update(3)}, {"q": update(4, gain=True)}, {"k": update(1)}]
ROWS = (1, None, 0, 2, 1)


def test_places_are_those_of_each_rows_own_factors():
    rows = RowUpdates(MIXES, ROWS)
    table, gains = rows.addressed("q", rows.on("q"))
    numbers = rows.numbers_on(torch.device("cpu")).tolist()
    for row, number in enumerate(numbers):
        own = None if ROWS[row] is None else MIXES[ROWS[row]].get("q")
        if own is None:
            assert number == -1 or not table.ranks[number]
            continue
        places = (own.A.data_ptr(), own.B.data_ptr(), own.rank)
        assert (table.A[number], table.B[number], table.ranks[number]) == places
    assert table.B_is_transposed
    assert table.most == 4
    assert gains is not None
    assert gains.shape == (5, 1, 5)
    assert torch.equal(gains[[1, 2, 3]], torch.ones(3, 1, 5))
    assert rows.addressed("k", rows.on("k"))[1] is None


def test_numbers_that_come_later_say_the_same():
    """As in a recorded step, whose rows change while it reads the same tensors."""
    rows = RowUpdates(MIXES, ROWS)
    numbers = torch.zeros(5, dtype=torch.long)
    later = rows.with_numbers(numbers)
    numbers.copy_(torch.tensor([-1 if mix is None else mix for mix in ROWS]))
    for layer in ("q", "k"):
        at_once = rows.stacked(layer, rows.on(layer))
        by_numbers = later.stacked(layer, later.on(layer))
        # Here all updates count as acting, and the factors are the same ones.
        assert torch.equal(by_numbers.A, at_once.A)
        assert torch.equal(by_numbers.mask, at_once.mask)
        if at_once.gain is not None:
            assert torch.equal(by_numbers.gain, at_once.gain)
