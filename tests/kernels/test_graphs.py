"""Calls recorded as graphs: sizes, the store of graphs, and the proof by the first replay."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from support.recorders import StandIn
from veneer.kernels import graphs
from veneer.kernels.graphs import Graphs, Tensors, is_near, length_for, size_for


class Refusing:
    def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        raise RuntimeError("operation not permitted when stream is capturing\nat some place")


def doubled(inputs: Tensors) -> Tensors:
    return {"y": 2 * inputs["x"]}


def test_sizes_hold_the_count_and_are_few():
    assert [size_for(n, 12) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    lengths = [length_for(n, 4096) for n in range(1, 4097)]
    assert all(n <= length for n, length in enumerate(lengths, 1))
    assert all(length <= 1.5 * n for n, length in enumerate(lengths, 1) if n > 256)
    sizes = sorted(set(lengths))
    assert sizes == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert length_for(900, 1000) == 1000  # no more places than there are


def test_a_shape_is_recorded_once_and_replayed_with_the_inputs_of_each_call():
    stand_in = StandIn()
    calls = Graphs(stand_in)
    for number in range(4):
        y = calls("a", doubled, {"x": torch.full((3,), float(number))})["y"]
        assert y.tolist() == [2.0 * number] * 3
    assert (stand_in.recorded, stand_in.replayed) == (1, 4)  # one of them is the proof
    calls("b", doubled, {"x": torch.ones(5)})
    assert stand_in.recorded == 2
    assert calls.notice() is None


def test_what_a_graph_reads_stays_in_memory_with_it(monkeypatch):
    """A true graph keeps addresses alone."""
    monkeypatch.setattr(graphs, "MOST", 1)
    factor = torch.ones(3)
    alive = weakref.ref(factor)

    def scaled(inputs: Tensors, factor: Tensor = factor) -> Tensors:
        return {"y": inputs["x"] * factor}

    def forgetful(function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        return lambda: None, function()

    calls = Graphs(forgetful)
    calls("a", scaled, {"x": torch.ones(3)})
    del scaled, factor
    assert alive() is not None
    calls("b", doubled, {"x": torch.ones(3)})
    assert alive() is None


def test_the_least_recently_used_graph_goes(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    stand_in = StandIn()
    calls = Graphs(stand_in)
    for key in ("a", "b", "a", "c", "a", "b"):
        calls(key, doubled, {"x": torch.ones(2)})
    assert stand_in.recorded == 4  # b twice


@pytest.mark.parametrize("fails", [False, True])
def test_after_recording_the_stream_is_the_one_before_and_waits_for_it(fails, monkeypatch):
    """By streams that only note who waits; torch leaves a graph's own where capturing fails."""
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            waits.append((self.name, other.name))

    current = [Stream("own")]

    @contextmanager
    def of(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def capture(graph: Any, *, stream: Stream, **options: Any) -> Iterator[None]:
        before, current[0] = current[0], stream
        yield
        current[0] = before

    fakes = {"device": nullcontext, "graph_pool_handle": object, "Stream": Stream, "stream": of}
    fakes |= {"CUDAGraph": Mock, "graph": capture, "current_stream": lambda: current[0]}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls: list[str] = []

    def function() -> Tensors:
        calls.append(current[0].name)
        if fails and len(calls) > graphs.WARM_UPS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {}

    with pytest.raises(RuntimeError) if fails else nullcontext():
        graphs.CudaRecorder(torch.device("cuda:1"))(function)
    assert calls == ["side"] * (graphs.WARM_UPS + 1)
    assert current[0].name == "own"
    assert waits == [("side", "own"), ("own", "side")]


def test_what_was_recorded_as_a_constant_is_noticed():
    """By the second call, whose inputs are others."""

    class Constant(StandIn):
        def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            results = function()
            return lambda: None, results

    calls = Graphs(Constant())
    for number in range(1, 4):
        y = calls("a", doubled, {"x": torch.full((3,), float(number))})["y"]
        assert y.tolist() == [2.0 * number] * 3
    assert "a replay gives something else (y)" in (calls.notice() or "")


def test_another_function_may_say_what_is_right():
    """The call as it is elsewhere, of which what is recorded is another form."""
    calls = Graphs(StandIn())
    right = calls("a", doubled, {"x": torch.ones(3)}, own=lambda inputs: {"y": inputs["x"] * 2.0})
    assert right["y"].tolist() == [2.0] * 3
    assert calls.why_not is None
    calls("b", doubled, {"x": torch.ones(3)}, own=lambda inputs: {"y": inputs["x"] * 3.0})
    assert calls.why_not is not None


@pytest.mark.parametrize(
    ("recorder", "why"),
    [
        (StandIn(wrong=0.5), "a replay gives something else (y)"),
        (Refusing(), "recording failed (operation not permitted when stream is capturing)"),
    ],
)
def test_what_is_not_proven_goes_on_as_it_is_and_says_so_once(recorder, why):
    calls = Graphs(recorder)
    for number in range(3):
        y = calls("a", doubled, {"x": torch.full((3,), float(number))})["y"]
        assert y.tolist() == [2.0 * number] * 3
    notice = calls.notice()
    assert notice is not None
    assert why in notice
    assert calls.notice() is None


def test_a_device_without_graphs_says_so():
    calls = Graphs.on(torch.device("cpu"))
    assert calls("a", doubled, {"x": torch.ones(2)})["y"].tolist() == [2.0, 2.0]
    assert graphs.NONE_HERE in (calls.notice() or "")


@pytest.mark.parametrize("recorder", [StandIn(), StandIn(wrong=0.5), Refusing(), None])
def test_what_adds_up_is_changed_once_by_each_call(recorder):
    """Gradients, as in a training step; also where recording and its proof called more often."""
    total = torch.zeros(3)
    calls = Graphs(recorder, changes=[total])

    def adding(inputs: Tensors) -> Tensors:
        total.add_(inputs["x"])
        return {"loss": inputs["x"].sum()}

    for number in range(1, 4):
        loss = calls("a", adding, {"x": torch.full((3,), float(number))})["loss"]
        assert float(loss) == 3 * number
        assert total.tolist() == [number * (number + 1) / 2] * 3


def test_a_replay_that_changes_something_else_is_refused():
    total = torch.zeros(3)
    count = 0

    def drifting(inputs: Tensors) -> Tensors:
        nonlocal count
        count += 1
        total.add_(inputs["x"] * count)
        return {"loss": inputs["x"].sum()}

    calls = Graphs(StandIn(), changes=[total])
    calls("a", drifting, {"x": torch.ones(3)})
    assert total.tolist() == [1.0] * 3
    assert "what it changes" in (calls.notice() or "")


def test_nearness_is_relative_and_knows_what_is_not_finite():
    x = torch.randn(100)
    assert is_near(x * (1 + 1e-6), x)
    assert not is_near(x * 1.01, x)
    infinite = torch.tensor([1.0, -torch.inf])
    assert is_near(infinite, infinite)
    assert not is_near(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]))
    assert not is_near(torch.tensor([1, 2]), torch.tensor([1, 3]))
