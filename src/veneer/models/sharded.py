"""A frozen base of which each of N processes holds 1/N, and which is whole only where it is used.

The frozen tensors of a block, of any dtype, lie end to end in one buffer of bytes. A process keeps
its N-th of each buffer. When a pass reaches a block, the buffer gets memory, the processes exchange
what they hold, and the next block's exchange is begun; when the pass has gone on, the memory is
freed. The tensors themselves stay the same objects all the time, as views of memory that comes and
goes, so that layers, fused functions and autograd may keep them (docs/adr/0007-own-sharding.md).
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.models.blocks import decoder_layers
from veneer.models.fingerprint import Sampled, marks_of, sampled_of
from veneer.processes.gathering import Gathering, begin_gathering
from veneer.processes.world import World
from veneer.quant.mapped import release
from veneer.quant.stack import QuantizedStack, quantized_modules
from veneer.quant.weight import QuantizedWeight

# Tensors of up to so many bytes stay whole in every process, among them the tables that all
# weights of a kind share (bitsandbytes' largest: 256 numbers in float32).
SMALL = 1024
ALIGNED = 64  # bytes; as torch's own allocator aligns tensors

Replace = Callable[[Tensor], None]


class Buffer:
    """The bytes of some tensors end to end, of which this process keeps its own part.

    chunk: the bytes of a part. pins: how many ask that the whole stays.
    """

    def __init__(self, tensors: Sequence[Tensor], world: World) -> None:
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += _aligned(tensor.nbytes)
        self.world, self.pins = world, 0
        self.chunk = _aligned(-(end // -world.size))
        device = tensors[0].device if tensors else None
        self._whole = torch.empty(world.size * self.chunk, dtype=torch.uint8, device=device)
        self._own = torch.zeros(self.chunk, dtype=torch.uint8, device=device)
        self.views = []  # tensors like those given, over the whole
        first = world.rank * self.chunk
        for tensor, offset in zip(tensors, offsets, strict=True):
            begin, stop = max(offset, first), min(offset + tensor.nbytes, first + self.chunk)
            if begin < stop:
                values = tensor.detach().contiguous().view(-1).view(torch.uint8)
                self._own[begin - first : stop - first] = values[begin - offset : stop - offset]
            # Not a slice: autograd would refuse tensors that it keeps when the buffer is written.
            strides = torch.empty(tensor.shape, device="meta").stride()
            view = torch.empty(0, dtype=tensor.dtype, device=device)
            storage, place = self._whole.untyped_storage(), offset // tensor.itemsize
            self.views.append(view.set_(storage, place, tensor.shape, strides))
        self._gathering: Gathering | None = None
        self._free()

    @torch.no_grad()
    def begin(self) -> None:
        """Begin to make the buffer whole, unless it is."""
        if self._gathering is None and self.chunk:
            self._whole.untyped_storage().resize_(self._whole.numel())
            self._gathering = begin_gathering(self._own, self._whole, self.world)

    def make_whole(self) -> None:
        """Return when the buffer is whole."""
        self.begin()
        if self._gathering is not None:
            self._gathering.wait()

    def drop(self) -> None:
        """Free all but this process's part."""
        if self._gathering is not None:
            self._gathering.wait()
            self._free()

    def _free(self) -> None:
        self._gathering = None
        if self._whole.device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
            # The heap would keep the pages, and next time may take others: in the end, of all.
            release([self._whole])
        self._whole.untyped_storage().resize_(0)


class Shards:
    """The buffers of a model in the order in which a pass uses them: embedding, blocks, head.

    A pass goes forward through all of them, and backward from the last block to the first that has
    a gradient. Whatever begins to use one calls `use`: hooks on the modules do, on both ways, and
    `whole` for code that reads weights beside a pass. Every process must make the same passes.
    """

    def __init__(self) -> None:
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
    def buffers(self) -> list[Buffer]:
        """The buffers in the order of their first use, each once."""
        return list(dict.fromkeys(self._order))

    @property
    def bytes_a_pass(self) -> int:
        """What a process gives in a pass forward and backward that follows another, where the first
        block trains: embedding, head, and each block twice but for the last, which is whole still
        when the way back begins, and the first, which is so when the next pass does."""
        gathered = [self._order[0], *self._order[2:], *self._order[1:-2]]
        return sum(buffer.chunk for buffer in gathered)

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
        raise ModelError("A sharded model cannot be copied: no process has the whole of it.")


# The modules of sharded models, with the number of the buffer that they use.
_USERS: WeakKeyDictionary[nn.Module, tuple[Shards, int]] = WeakKeyDictionary()


@contextmanager
def whole(*modules: nn.Module | None) -> Iterator[None]:
    """Have all weights of modules whole while the context lasts; nothing to do where no process
    shares the base. For code that reads weights beside a pass, in all processes alike."""
    if not _USERS:
        yield
        return
    numbers: dict[Shards, set[int]] = {}
    for module in modules:
        for inner in module.modules() if module is not None else ():
            if inner in _USERS:
                shards, number = _USERS[inner]
                numbers.setdefault(shards, set()).add(number)
    pinned = [buffer for shards in numbers for buffer in shards.pin(numbers[shards])]
    try:
        yield
    finally:
        for buffer in pinned:
            buffer.pins -= 1


def shards_of(model: nn.Module) -> Shards | None:
    """Return how a model's base is sharded, or None where it is not."""
    return getattr(model, "veneer_shards", None)


def shard_base(model: PreTrainedModel, world: World) -> PreTrainedModel:
    """Shard a frozen model over the processes of a world, in place, before adapters are attached.

    Every process must have the same model. What it was in memory is freed block by block; where
    not even one process has room for it, `load_base(name, world=world)` never makes it whole.
    Raises ModelError for a model whose list of layers is not known.
    """
    if world.size > 1:
        sharder = Sharder(model, world)
        sharder.finish()
    return model


class Sharder:
    """Shards a model while its weights come in, one after another, and takes its fingerprint.

    device: where the shards are to lie; where the weights do, unless given.
    """

    def __init__(
        self, model: PreTrainedModel, world: World, device: torch.device | None = None
    ) -> None:
        layers, head = decoder_layers(model), model.get_output_embeddings()
        if layers is None or head is None:
            raise ModelError("The layers of this model are not known, so it cannot be sharded.")
        self._model, self._world, self._device = model, world, device
        path_of = {module: path for path, module in model.named_modules()}
        modules = [model.get_input_embeddings(), *layers, head]
        self._paths = [path_of[module] for module in modules]
        self._buffers: dict[str, Buffer] = {}  # of what is sharded already, by path
        self._sampled: dict[str, Sampled] = {}
        self._current: str | None = None

    def note(self, name: str) -> None:
        """Take note that the model has got the weight `name`: the block before may be whole."""
        before = self._current
        self._current = next((p for p in self._paths if name.startswith(f"{p}.")), None)
        if before is not None and before != self._current and before not in self._buffers:
            module = self._model.get_submodule(before)
            if not any(parameter.is_meta for parameter in module.parameters()):
                self._shard(before)

    def finish(self) -> None:
        """Shard what is left, and have passes gather it."""
        model, shards = self._model, Shards()
        *_, head = self._paths
        if _same_weight(model.get_submodule(self._paths[0]), model.get_submodule(head)):
            self._buffers[head] = self._buffers.get(self._paths[0]) or self._shard(self._paths[0])
        for path in self._paths:
            buffer = self._buffers.get(path) or self._shard(path)
            shards.add(model.get_submodule(path), buffer)
        if not hasattr(model, "veneer_marks"):
            model.veneer_marks = marks_of(model, self._sampled)  # type: ignore[assignment]
        model.veneer_shards = shards  # type: ignore[assignment]

    def _shard(self, path: str) -> Buffer:
        module = self._model.get_submodule(path)
        self._sampled |= sampled_of(module, f"{path}.")
        if self._device is not None:
            module.to(self._device)
        tensors, replacements = _frozen(module)
        buffer = Buffer(tensors, self._world)
        for view, replace in zip(buffer.views, replacements, strict=True):
            for each in replace:
                each(view)
        self._buffers[path] = buffer
        return buffer


def _frozen(module: nn.Module) -> tuple[list[Tensor], list[list[Replace]]]:
    """Return the weights in a module, each once, and how each is replaced where it is used."""
    module.requires_grad_(False)
    places: dict[int, tuple[Tensor, list[Replace]]] = {}

    def note(tensor: Tensor, replace: Replace) -> None:
        if tensor.nbytes > SMALL:
            places.setdefault(id(tensor), (tensor, []))[1].append(replace)

    for parameter in module.parameters():
        note(parameter, partial(setattr, parameter, "data"))
    for quantized in quantized_modules(module).values():
        if isinstance(quantized, QuantizedStack):
            quantized.experts = [_owned(expert, note) for expert in quantized.experts]
        else:
            quantized.quantized_weight = _owned(quantized.quantized_weight, note)
    return [tensor for tensor, _ in places.values()], [each for _, each in places.values()]


def _owned(value: Any, note: Callable[[Tensor, Replace], None]) -> Any:
    """Return a copy of a quantized weight, however its class keeps its tensors, over the same ones;
    call `note` with each. Copies of a model share their weights, and not all may be sharded."""
    own = copy.copy(value)
    entries: Any = own if isinstance(own, dict) else vars(own)
    for name, entry in list(entries.items()):
        if isinstance(entry, Tensor):
            note(entry, partial(entries.__setitem__, name))
        elif isinstance(entry, dict | QuantizedWeight) or hasattr(entry, "absmax"):
            entries[name] = _owned(entry, note)
        elif isinstance(entry, tuple) and any(isinstance(x, QuantizedWeight) for x in entry):
            entries[name] = tuple(_owned(piece, note) for piece in entry)
    return own


def _same_weight(embedding: nn.Module, head: nn.Module) -> bool:
    weight = embedding._parameters.get("weight")
    return weight is not None and weight is head._parameters.get("weight")


def _aligned(count: int) -> int:
    return -(count // -ALIGNED) * ALIGNED
