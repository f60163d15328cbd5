"""A small model trains in one thread; the caller's number comes back after each step."""

from contextlib import contextmanager, suppress

import pytest
import torch

from support.tiny_models import tiny
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.data.encode import Example
from veneer.training import threads
from veneer.training.config import TrainConfig
from veneer.training.events import Evaluated, Step
from veneer.training.loop import train

ROWS = [Example(row, row, f"row {n}", 0) for n, row in enumerate([[5, 6, 7, 8], [9, 5, 4]])]


@contextmanager
def torch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("limit", "expected"), [(threads.WIDTH_OF_ONE_THREAD, 1), (8, 2)])
def test_the_width_decides_how_many_threads_compute(monkeypatch, limit, expected):
    monkeypatch.setattr(threads, "WIDTH_OF_ONE_THREAD", limit)
    model = tiny("llama")
    attach(model, LoRA(rank=2), seed=0)
    computing = []
    decoder = model.get_decoder()
    with torch_threads(2):
        course = TrainConfig(steps=2, tokens_per_step=8, lr=1e-3)
        events = []
        for event in train(model, ROWS, course, held_out=ROWS):
            if not events:  # after the proofs, which are a few short rows
                decoder.register_forward_hook(lambda *_: computing.append(torch.get_num_threads()))
            events.append(event)
            assert torch.get_num_threads() == 2
    assert sum(isinstance(event, (Step, Evaluated)) for event in events) >= 4
    assert set(computing) == {expected}


def test_they_come_back_after_an_error():
    with torch_threads(2):
        with suppress(InterruptedError), threads.worthwhile_threads(tiny("llama")):
            assert torch.get_num_threads() == 1
            raise InterruptedError
        assert torch.get_num_threads() == 2
