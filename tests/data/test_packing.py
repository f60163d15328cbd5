"""Every row once an epoch, within the limits, in an order that seed and epoch decide."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import StepOrder, filled_up, pack, split_held_out
from veneer.errors import DataError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
LIMIT = st.integers(1, 120)


def examples_of(lengths: list[int]) -> list[Example]:
    draw = np.random.default_rng(len(lengths))
    examples = []
    for n in lengths:
        tokens = draw.integers(0, 1000, n).tolist()
        labels = [UNLABELLED, *(t if draw.random() < 0.5 else UNLABELLED for t in tokens[1:])]
        examples.append(Example(tokens, labels, "f:1", 0))
    return examples


@given(lengths=LENGTHS, step=LIMIT, batch=LIMIT, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_each_row_once_within_the_limits_and_the_same_again(lengths, step, batch, seed, epoch):
    order = StepOrder(lengths, step, batch, seed)
    steps = order.epoch(epoch)
    assert sorted(i for s in steps for b in s for i in b) == list(range(len(lengths)))
    for rows_of_step in steps:
        rows = [i for b in rows_of_step for i in b]
        assert len(rows) == 1 or sum(lengths[i] for i in rows) <= step
        for b in rows_of_step:
            assert b
            assert len(b) == 1 or sum(lengths[i] for i in b) <= batch
        in_order = [lengths[i] for i in rows]
        assert in_order == sorted(in_order, reverse=True)
    again = StepOrder(lengths, step, batch, seed)
    again.epoch(epoch + 1)
    assert again.epoch(epoch) == steps


@given(lengths=LENGTHS, limit=LIMIT, seed=st.integers(0, 9))
def test_no_fewer_steps_are_possible_in_that_order(lengths, limit, seed):
    steps = StepOrder(lengths, limit, 1, seed).epoch(0)
    shuffled = np.random.default_rng(np.random.SeedSequence([seed, 0])).permutation(len(lengths))
    greedy, free = 0, 0
    for length in (lengths[i] for i in shuffled):
        if length > free:
            greedy, free = greedy + 1, limit
        free -= length
    assert len(steps) == greedy


@given(rows=st.integers(20, 200), tokens=st.integers(20, 100), seed=st.integers(0, 99))
def test_no_step_is_a_leftover(rows, tokens, seed):
    lengths = np.random.default_rng(seed).integers(1, 6, rows).tolist()
    steps = [
        sum(lengths[i] for b in s for i in b) for s in StepOrder(lengths, tokens, 50, seed).epoch(0)
    ]
    assert min(steps) >= max(steps) / 2


def test_seeds_and_epochs_differ():
    lengths = [5] * 50
    orders = [StepOrder(lengths, 50, 20, seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@given(data=st.data(), lengths=LENGTHS)
def test_packed_rows_are_the_rows_with_labels_one_place_ahead(data, lengths):
    examples = examples_of(lengths)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=10))
    batch = pack(examples, indices)
    assert {a.dtype for a in (batch.tokens, batch.labels, batch.positions)} == {np.dtype("int64")}
    assert batch.rows.tolist() == indices
    assert batch.lengths.tolist() == [lengths[i] for i in indices]
    ends = np.cumsum(batch.lengths)
    for i, end in zip(indices, ends, strict=True):
        row = slice(end - lengths[i], end)
        assert batch.tokens[row].tolist() == examples[i].tokens
        assert batch.positions[row].tolist() == list(range(lengths[i]))
        assert batch.labels[row].tolist() == [*examples[i].labels[1:], UNLABELLED]
    assert np.sum(batch.labels != UNLABELLED) == sum(examples[i].label_tokens for i in indices)


@given(n=st.integers(1, 50), seed=st.integers(0, 9), data=st.data())
def test_held_out_rows_and_training_rows_are_all_rows(n, seed, data):
    held = data.draw(st.integers(0, n - 1))
    train, held_out = split_held_out(n, eval_rows=held, seed=seed)
    assert len(held_out) == held
    assert sorted(train + held_out) == list(range(n))
    assert (train, held_out) == split_held_out(n, eval_rows=held, seed=seed)


def test_holding_out_everything_is_refused():
    with pytest.raises(DataError, match="hold out fewer"):
        split_held_out(5, eval_rows=5, seed=0)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), multiple=st.integers(1, 16))
def test_filled_up_with_one_row_that_teaches_nothing(lengths, multiple):
    batch = pack(examples_of(lengths), range(len(lengths)))
    full = filled_up(batch, multiple)
    tokens = len(batch.tokens)
    assert len(full.tokens) % multiple == 0
    assert len(full.tokens) - tokens < multiple
    for name in ("tokens", "labels", "positions"):
        assert getattr(full, name)[:tokens].tolist() == getattr(batch, name).tolist()
    assert set(full.tokens[tokens:]) <= set(batch.tokens)
    assert (full.labels[tokens:] == UNLABELLED).all()
    assert full.positions.max() == batch.positions.max()
    assert sum(full.lengths) == len(full.tokens)
    assert min(full.lengths) > 0
    assert full.rows.tolist() == batch.rows.tolist()


def test_what_stands_in_front_of_rows_counts_in_a_pass_and_not_in_a_step():
    lengths = [10] * 24
    plain = StepOrder(lengths, 60, 60, seed=0)
    behind = StepOrder(lengths, 60, 60, seed=0, in_front=20)
    for epoch in range(2):
        steps, others = plain.epoch(epoch), behind.epoch(epoch)
        assert [sorted(chain(*step)) for step in others] == [sorted(chain(*s)) for s in steps]
        assert {len(batch) for step in steps for batch in step} == {6}
        assert {len(batch) for step in others for batch in step} == {2}
