"""A frozen base of which each of N processes holds 1/N, and which is whole only where it is used.

A process keeps its N-th of each buffer of models/block_buffers.py. To fill one, the processes
exchange what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.models.block_buffers import (
    Buffer,
    BufferedBase,
    Filling,
    Passes,
    aligned,
    offsets_of,
    passes_of,
)
from veneer.processes.gathering import begin_gathering
from veneer.processes.world import World

WHY_NOT_WHOLE = "its base is sharded, so no process has all of it"


class SharedBuffer(Buffer):
    """A buffer of which this process keeps its own part. chunk: the bytes of a part."""

    def __init__(
        self, tensors: Sequence[Tensor], world: World, device: torch.device | None
    ) -> None:
        offsets = offsets_of(tensors)
        end = sum(aligned(tensor.nbytes) for tensor in tensors)
        self.world, self.chunk = world, aligned(-(end // -world.size))
        self._own = torch.zeros(self.chunk, dtype=torch.uint8, device=device)
        first = world.rank * self.chunk
        for tensor, offset in zip(tensors, offsets, strict=True):
            begin, stop = max(offset, first), min(offset + tensor.nbytes, first + self.chunk)
            if begin < stop:
                values = tensor.detach().contiguous().view(-1).view(torch.uint8)
                self._own[begin - first : stop - first] = values[begin - offset : stop - offset]
        super().__init__(tensors, world.size * self.chunk, device)

    def _fill(self) -> Filling:
        return begin_gathering(self._own, self._whole, self.world)


def bytes_a_pass(passes: Passes) -> int:
    """Return what a process gives in a pass forward and backward that follows another, where the
    first block trains: embedding, head, and each block twice but for the last, which is whole still
    when the way back begins, and the first, which is so when the next pass does."""
    order = passes.order
    gathered = [order[0], *order[2:], *order[1:-2]]
    return sum(buffer.chunk for buffer in gathered if isinstance(buffer, SharedBuffer))


def is_shared(model: PreTrainedModel) -> bool:
    """Return whether each of several processes holds its part only of a model's base."""
    passes = passes_of(model)
    return passes is not None and any(isinstance(b, SharedBuffer) for b in passes.buffers)


def shard_base(model: PreTrainedModel, world: World) -> PreTrainedModel:
    """Shard a frozen model over the processes of a world, in place, before adapters are attached.

    Every process must have the same model, and make the same passes. What it was in memory is freed
    block by block; where not even one process has room for it, `load_base(name, world=world)` never
    makes it whole. Raises ModelError for a model whose list of layers is not known.
    """
    if world.size > 1:
        sharder(model, world).finish()
    return model


def sharder(
    model: PreTrainedModel, world: World, device: torch.device | None = None
) -> BufferedBase:
    """Return what shards a model while its weights come in.

    device: where the shards are to lie; where the weights do, unless given.
    """

    def buffer_of(tensors: Sequence[Tensor]) -> Buffer:
        return SharedBuffer(tensors, world, device or (tensors[0].device if tensors else None))

    return BufferedBase(model, buffer_of, device=device, why_not_whole=WHY_NOT_WHOLE)
