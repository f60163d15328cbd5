"""Calls of fixed shapes as CUDA graphs: recorded once, and then asked for at once.

A step of decoding is hundreds of small kernels, and asking for each takes longer than it runs. A
graph asks for all of them with one call. It reads its inputs where they were when it was recorded,
so there is one for each shape, inputs are copied into its own, and its results are overwritten by
the next replay. All graphs share one pool of memory, as only one of them runs at a time.

A graph is used only after its first two replays have given what the function itself gave: the
second with other inputs, as something of the first might have been recorded as a constant. Where
they do not, or where recording fails, functions go on being called as they are, and one notice says
so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UPS = 2  # calls before recording, in which libraries choose their ways and get their memory
PROOFS = 2  # replays that are compared: with the inputs that were recorded, and with the next ones
MOST = 48  # graphs at a time; the least recently used ones are dropped
# How far a replay may be from the call itself, relative to its length: libraries may choose another
# way for a stream that is recorded.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}

NONE_HERE = "only NVIDIA's and AMD's cards have them"

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensors]


def size_for(count: int, most: int) -> int:
    """Return the rows of a graph for `count` rows: the next power of two, `most` at most."""
    return min(most, 1 << max(0, count - 1).bit_length())


def length_for(count: int, most: int, least: int = 256) -> int:
    """Return the places of a graph for `count` places: `least` times a power of two or three
    quarters of one, `most` at most; so a third is unused at worst."""
    sizes = [least]
    while sizes[-1] < count:
        last = sizes[-1]
        sizes.append(last * 3 // 2 if last & (last - 1) == 0 else last // 3 * 4)
    return min(most, sizes[bisect_left(sizes, count)])


class Recorder(Protocol):
    """What records the work that a function asks a device for."""

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Call a function, and return what does its work again, and the results, which that
        overwrites."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory and on one stream, as torch keeps memory for
    cuBLAS by stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            stream, graph = self._stream, torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                # Around all of it: where recording fails, torch.cuda.graph leaves its stream as the
                # current one.
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        function()
                    # Other threads may load an adapter meanwhile.
                    mode = "thread_local"
                    with torch.cuda.graph(
                        graph, pool=self._pool, stream=stream, capture_error_mode=mode
                    ):
                        results = function()
            finally:
                torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, results


class _Recorded:
    """A function of tensors that was recorded with inputs of its own. proofs: how often a replay
    was compared with the function."""

    proofs = 0

    def __init__(self, function: Function, inputs: Tensors, record: Recorder) -> None:
        self.function = function  # a replay reads what it refers to, which must stay in memory
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._replay, self._results = record(lambda: function(self.inputs))

    def __call__(self, inputs: Tensors) -> Tensors:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self._replay()
        return self._results


class Graphs:
    """Graphs of functions, by keys that say all that their shapes and addresses depend on.

    changes: tensors that the functions change beside what they return, in a way that depends on
    what they hold, such as gradients that add up. They hold what one call gives after each call.
    """

    def __init__(self, record: Recorder | None, *, changes: Sequence[Tensor] = ()) -> None:
        self._record, self._changes = record, changes
        self._graphs: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self.why_not: str | None = None if record is not None else NONE_HERE
        self._announced = False

    @classmethod
    def on(cls, device: torch.device, *, changes: Sequence[Tensor] = ()) -> Graphs:
        """Return graphs for a device; where it has none, functions are called as they are."""
        recorder = CudaRecorder(device) if device.type == "cuda" else None
        return cls(recorder, changes=changes)

    def __call__(
        self, key: Hashable, function: Function, inputs: Tensors, *, own: Function | None = None
    ) -> Tensors:
        """Return what `function` gives for `inputs`, valid until the next call.

        own: what gives it where nothing is recorded, and what replays are compared with, if that is
        not the function itself.
        """
        own = function if own is None else own
        if self.why_not is not None or self._record is None:
            return own(inputs)
        graph = self._graphs.get(key)
        if graph is None or graph.proofs < PROOFS:
            return self._prove(key, graph, function, inputs, own)
        self._graphs.move_to_end(key)
        return graph(inputs)

    def notice(self) -> str | None:
        """Return, once, why functions are called as they are."""
        if self._announced or self.why_not is None:
            return None
        self._announced = True
        return notice_of(self.why_not)

    def _prove(
        self,
        key: Hashable,
        graph: _Recorded | None,
        function: Function,
        inputs: Tensors,
        own: Function,
    ) -> Tensors:
        """Call a function as it is, and compare what a replay gives."""
        assert self._record is not None
        before = [tensor.clone() for tensor in self._changes]
        expected = {name: tensor.clone() for name, tensor in own(inputs).items()}
        after = [tensor.clone() for tensor in self._changes]
        try:
            if graph is None:
                graph = _Recorded(function, inputs, self._record)
            _write(self._changes, before)
            replayed = graph(inputs)
            wrong = [name for name in expected if not is_near(replayed[name], expected[name])]
            if not all(map(is_near, self._changes, after)):
                wrong.append("what it changes")
            if wrong:
                self.why_not = f"a replay gives something else ({', '.join(wrong)})"
        except Exception as error:  # whatever a library says of a call that cannot be recorded
            reason = str(error).partition("\n")[0] or repr(error)
            self.why_not = f"recording failed ({reason})"
        else:
            graph.proofs += 1
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            # Never all of them: torch records to a pool again only while a graph of it is there.
            while len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
        if self.why_not is not None:
            self._graphs.clear()
        _write(self._changes, after)
        return expected


def notice_of(why_not: str) -> str:
    """Return, for a person, why functions are called as they are."""
    return f"Nothing is replayed as a CUDA graph, which would be faster: {why_not}."


def is_near(replayed: Tensor, own: Tensor) -> bool:
    """Return whether a replay's result is the call's own, but for rounding. Integers are equal."""
    if not own.is_floating_point():
        return torch.equal(replayed, own)
    ours, theirs = replayed.double(), own.double()
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return False
    ours, theirs = ours.masked_fill(~finite, 0), theirs.masked_fill(~finite, 0)
    return bool((ours - theirs).norm() <= TOLERANCE[own.dtype] * theirs.norm())


def _write(tensors: Sequence[Tensor], values: Sequence[Any]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
