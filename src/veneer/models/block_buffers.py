"""A frozen base whose weights are on the device only while a pass uses them, block by block.

The frozen tensors of a block, of any dtype, lie end to end in one buffer of bytes. When a pass
reaches a block, its buffer gets memory and is filled, and the next one's filling is begun; when the
pass has gone on, the memory is freed. The tensors themselves stay the same objects all the time, as
views of memory that comes and goes, so that layers, fused functions and autograd may keep them
(docs/adr/0007-own-sharding.md). From where a buffer is filled, its class says: from the other
processes (models/sharded.py), or from this machine's memory or disk (models/offload.py).
"""

from __future__ import annotations

import copy
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.models.blocks import decoder_layers
from veneer.models.fingerprint import Sampled, marks_of, sampled_of
from veneer.quant.mapped import release
from veneer.quant.stack import QuantizedStack, quantized_modules
from veneer.quant.weight import QuantizedWeight

# Tensors of up to so many bytes are always whole, among them the tables that all weights of a kind
# share (bitsandbytes' largest: 256 numbers in float32).
SMALL = 1024
ALIGNED = 64  # bytes; as torch's own allocator aligns tensors

Replace = Callable[[Tensor], None]


class Filling(Protocol):
    """What fills a buffer, and has begun."""

    def wait(self) -> None:
        """Return when what is asked of the device from now on finds the buffer filled."""


class Buffer(ABC):
    """The bytes of some tensors end to end, in memory only while a pass uses them.

    views: tensors like those given, over the whole. pins: how many ask that the whole stays.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int, device: torch.device | None) -> None:
        self.pins = 0
        self._whole = torch.empty(size, dtype=torch.uint8, device=device)
        self.views = []
        for tensor, offset in zip(tensors, offsets_of(tensors), strict=True):
            # Not a slice: autograd would refuse tensors that it keeps when the buffer is written.
            strides = torch.empty(tensor.shape, device="meta").stride()
            view = torch.empty(0, dtype=tensor.dtype, device=device)
            storage, place = self._whole.untyped_storage(), offset // tensor.itemsize
            self.views.append(view.set_(storage, place, tensor.shape, strides))
        self._filling: Filling | None = None
        self._free()

    @abstractmethod
    def _fill(self) -> Filling:
        """Begin to fill `_whole`, which has memory."""

    @torch.no_grad()
    def begin(self) -> None:
        """Begin to make the buffer whole, unless it is."""
        if self._filling is None and self._whole.numel():
            self._whole.untyped_storage().resize_(self._whole.numel())
            self._filling = self._fill()

    def make_whole(self) -> None:
        """Return when the buffer is whole."""
        self.begin()
        if self._filling is not None:
            self._filling.wait()

    def drop(self) -> None:
        """Free the memory of the whole."""
        if self._filling is not None:
            self._filling.wait()
            self._free()

    def _free(self) -> None:
        self._filling = None
        if self._whole.device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
            # The heap would keep the pages, and next time may take others: in the end, of all.
            release([self._whole])
        self._whole.untyped_storage().resize_(0)


class Passes:
    """The buffers of a model in the order in which a pass uses them: embedding, blocks, head.

    A pass goes forward through all of them, and backward from the last block to the first that has
    a gradient. Whatever begins to use one calls `use`: hooks on the modules do, on both ways, and
    `whole` for code that reads weights beside a pass.

    why_not_whole: why the device never has the whole base, for a person.
    """

    def __init__(self, why_not_whole: str) -> None:
        self.why_not_whole = why_not_whole
        self._order: list[Buffer] = []
        self._first_with_gradient = 0

    def add(self, module: nn.Module, buffer: Buffer) -> None:
        """Use `buffer` next, whenever a pass has come to `module`."""
        number = len(self._order)
        self._order.append(buffer)
        module.register_forward_pre_hook(lambda *_: self.use(number))
        module.register_forward_hook(lambda _module, _args, y: self._watch(number, y))
        for inner in module.modules():
            _USERS[inner] = (self, number)

    @property
    def order(self) -> Sequence[Buffer]:
        """The buffers in the order in which a pass forward uses them."""
        return self._order

    @property
    def buffers(self) -> list[Buffer]:
        """The buffers in the order of their first use, each once."""
        return list(dict.fromkeys(self._order))

    def use(self, number: int, *, backward: bool = False) -> None:
        """Have the buffer `number` whole, begin on the one used next, and free all others."""
        if number <= 1 and not backward:
            self._first_with_gradient = len(self._order)
        current = self._order[number]
        following = self._following(number, backward=backward)
        for buffer in self._order:
            if buffer is not current and buffer is not following and not buffer.pins:
                buffer.drop()
        current.make_whole()
        if following is not None:
            following.begin()

    def _following(self, number: int, *, backward: bool) -> Buffer | None:
        last_block = len(self._order) - 2
        if backward:
            following = number - 1
            return self._order[following] if following >= self._first_with_gradient else None
        if number <= last_block:
            return self._order[number + 1]
        return self._order[last_block] if torch.is_grad_enabled() else None

    def _watch(self, number: int, output: Any) -> None:
        """Have the buffer whole again before gradients of a module's output reach it."""
        if not torch.is_grad_enabled():
            return
        outputs = [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
        for y in outputs:
            y.register_hook(lambda _: self.use(number, backward=True))
        if outputs and number < self._first_with_gradient:
            self._first_with_gradient = number

    def pin(self, numbers: set[int]) -> list[Buffer]:
        """Have buffers whole, and return them: so they are until their pins are taken away."""
        head, buffers = len(self._order) - 1, [self._order[number] for number in sorted(numbers)]
        if numbers == {head}:  # in a pass, which comes back to the last block
            self.use(head)
        else:
            for buffer in self.buffers:
                if buffer not in buffers and not buffer.pins:
                    buffer.drop()
        for buffer in buffers:
            buffer.pins += 1
            buffer.make_whole()
        return buffers

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise ModelError(f"This model cannot be copied: {self.why_not_whole}.")


# The modules whose weights are in buffers, with the number of the buffer that they use.
_USERS: WeakKeyDictionary[nn.Module, tuple[Passes, int]] = WeakKeyDictionary()


@contextmanager
def whole(*modules: nn.Module | None) -> Iterator[None]:
    """Have all weights of modules whole while the context lasts; nothing to do where none is in a
    buffer. For code that reads weights beside a pass, in all processes alike."""
    if not _USERS:
        yield
        return
    numbers: dict[Passes, set[int]] = {}
    for module in modules:
        for inner in module.modules() if module is not None else ():
            if inner in _USERS:
                passes, number = _USERS[inner]
                numbers.setdefault(passes, set()).add(number)
    pinned = [buffer for passes in numbers for buffer in passes.pin(numbers[passes])]
    try:
        yield
    finally:
        for buffer in pinned:
            buffer.pins -= 1


def passes_of(model: nn.Module) -> Passes | None:
    """Return the buffers of a model's base, or None where it is whole in memory."""
    return getattr(model, "veneer_passes", None)


class BufferedBase:
    """Moves a model's frozen weights into buffers while they come in, one after another, and takes
    its fingerprint.

    buffer_of: makes the buffer of some tensors. device: where its views are. why_not_whole: as of
    Passes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buffer_of: Callable[[Sequence[Tensor]], Buffer],
        *,
        device: torch.device | None,
        why_not_whole: str,
    ) -> None:
        layers, head = decoder_layers(model), model.get_output_embeddings()
        if layers is None or head is None:
            raise ModelError(
                f"The layers of this model are not known, but they have to be: {why_not_whole}."
            )
        self._model, self._buffer_of, self._device = model, buffer_of, device
        self._why_not_whole = why_not_whole
        path_of = {module: path for path, module in model.named_modules()}
        modules = [model.get_input_embeddings(), *layers, head]
        self._paths = [path_of[module] for module in modules]
        self._buffers: dict[str, Buffer] = {}  # of what is there already, by path
        self._sampled: dict[str, Sampled] = {}
        self._current: str | None = None

    def note(self, name: str) -> None:
        """Take note that the model has got the weight `name`: the block before may be whole."""
        before = self._current
        self._current = next((p for p in self._paths if name.startswith(f"{p}.")), None)
        if before is not None and before != self._current and before not in self._buffers:
            module = self._model.get_submodule(before)
            if not any(parameter.is_meta for parameter in module.parameters()):
                self._move(before)

    def finish(self) -> None:
        """Move what is left, and have passes fill the buffers."""
        model, passes = self._model, Passes(self._why_not_whole)
        *_, head = self._paths
        if _same_weight(model.get_submodule(self._paths[0]), model.get_submodule(head)):
            self._buffers[head] = self._buffers.get(self._paths[0]) or self._move(self._paths[0])
        for path in self._paths:
            buffer = self._buffers.get(path) or self._move(path)
            passes.add(model.get_submodule(path), buffer)
        if not hasattr(model, "veneer_marks"):
            model.veneer_marks = marks_of(model, self._sampled)  # type: ignore[assignment]
        model.veneer_passes = passes  # type: ignore[assignment]

    def _move(self, path: str) -> Buffer:
        module = self._model.get_submodule(path)
        self._sampled |= sampled_of(module, f"{path}.")
        tensors, replacements = _frozen(module, self._device)
        buffer = self._buffer_of(tensors)
        for view, replace in zip(buffer.views, replacements, strict=True):
            for each in replace:
                each(view)
        self._buffers[path] = buffer
        return buffer


def _frozen(
    module: nn.Module, device: torch.device | None
) -> tuple[list[Tensor], list[list[Replace]]]:
    """Return the weights in a module, each once, and how each is replaced where it is used. What is
    small is moved to the device at once."""
    module.requires_grad_(False)
    places: dict[int, tuple[Tensor, list[Replace]]] = {}

    def note(tensor: Tensor, replace: Replace) -> None:
        if tensor.nbytes > SMALL:
            places.setdefault(id(tensor), (tensor, []))[1].append(replace)
        elif device is not None and tensor.device != device:
            replace(tensor.to(device))

    for parameter in module.parameters():
        note(parameter, partial(setattr, parameter, "data"))
    for quantized in quantized_modules(module).values():
        if isinstance(quantized, QuantizedStack):
            quantized.experts = [_owned(expert, note, device) for expert in quantized.experts]
            quantized.device = device or quantized.device
        else:
            quantized.quantized_weight = _owned(quantized.quantized_weight, note, device)
    return [tensor for tensor, _ in places.values()], [each for _, each in places.values()]


def _owned(value: Any, note: Callable[[Tensor, Replace], None], device: torch.device | None) -> Any:
    """Return a copy of a quantized weight, however its class keeps its tensors, over the same ones;
    call `note` with each. Copies of a model share their weights, and not all may be in buffers."""
    own = copy.copy(value)
    if device is not None and isinstance(own, QuantizedWeight):
        own.device = device
    entries: Any = own if isinstance(own, dict) else vars(own)
    for name, entry in list(entries.items()):
        if isinstance(entry, Tensor):
            note(entry, partial(entries.__setitem__, name))
        elif isinstance(entry, dict | QuantizedWeight) or hasattr(entry, "absmax"):
            entries[name] = _owned(entry, note, device)
        elif isinstance(entry, tuple) and any(isinstance(x, QuantizedWeight) for x in entry):
            entries[name] = tuple(_owned(piece, note, device) for piece in entry)
    return own


def _same_weight(embedding: nn.Module, head: nn.Module) -> bool:
    weight = embedding._parameters.get("weight")
    return weight is not None and weight is head._parameters.get("weight")


def offsets_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return where each tensor begins in a buffer of them."""
    ends = accumulate(aligned(tensor.nbytes) for tensor in tensors)
    return [0, *ends][: len(tensors)]


def aligned(count: int) -> int:
    """Return the bytes that so many take in a buffer."""
    return -(count // -ALIGNED) * ALIGNED
