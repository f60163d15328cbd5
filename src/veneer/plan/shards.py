"""The bytes of a base that is sharded over processes, as models/sharded.py lays them out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from veneer.models.block_buffers import ALIGNED, SMALL
from veneer.models.description import Layer
from veneer.plan.activations import FLOAT32
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import PlanConfig
from veneer.plan.sizes import Sizes

# Of NF4 (quant/nf4.py), which is not imported: it loads bitsandbytes.
BLOCK, BLOCK_OF_SCALES = 64, 256


@dataclass(frozen=True)
class Buffer:
    """The frozen tensors of a block, or of the embedding or head, end to end; `chunk` is what each
    of `count` processes holds of them."""

    tensors: tuple[int, ...]  # bytes of each
    count: int

    @cached_property
    def chunk(self) -> int:
        end = sum(_aligned(size) for size in self.tensors if size > SMALL)
        return _aligned(-(end // -self.count))

    @property
    def whole(self) -> int:
        """Bytes while it is gathered."""
        return self.chunk * self.count

    @property
    def small(self) -> int:
        """Bytes of the tensors that stay whole in every process."""
        return sum(size for size in self.tensors if size <= SMALL)


@dataclass(frozen=True)
class Shards:
    """A base over `count` processes: its embedding, blocks and head, in the order of a pass, and
    the bytes of all else, which each process holds.

    is_tied: whether the head is the embedding. first_block: the lowest block that a gradient must
    reach.
    """

    order: tuple[Buffer, ...]
    rest: int
    is_tied: bool
    first_block: int

    @property
    def own(self) -> Amount:
        """What a process holds of what is sharded."""
        order = self.order[:-1] if self.is_tied else self.order
        count = self.order[0].count
        alike = Counter(buffer.chunk for buffer in order)
        return amount(
            "weights' share",
            *(
                Term.of(
                    *(number, "", chunk, "bytes"),
                    note=f"1 / {count} of {count * chunk:,}" if count > 1 else "",
                )
                for chunk, number in alike.items()
            ),
        )

    @property
    def gathered(self) -> Amount:
        """What is whole at a time: a block, and the one ahead of it."""
        pairs = zip(self.order, self.order[1:], strict=False)
        both = max(pairs, key=lambda pair: pair[0].whole + pair[1].whole)
        terms = (Term.of(buffer.whole, "bytes") for buffer in both)
        return amount("a gathered block, and the next", *terms)

    @property
    def whole(self) -> Amount:
        """What each process has whole."""
        small = sum(buffer.small for buffer in self.order)
        return amount(
            "norms outside of blocks", Term.of(self.rest + small, "bytes", note="and what is small")
        )

    @property
    def given(self) -> list[Term]:
        """What a process gives in a pass: its share of each buffer forward, and backward again of
        the blocks below the last down to the lowest with a gradient.

        What is there already is not gathered: the last block when a pass turns round, and, after
        the first pass, the first block where the pass before has ended there.
        """
        first = 1 + self.first_block
        forward = self.order if first > 1 else self.order[:1] + self.order[2:]
        ways = (("forward", forward), ("backward", self.order[first:-2]))
        return [
            Term.of(number, "", chunk, "bytes", note=way)
            for way, buffers in ways
            for chunk, number in Counter(buffer.chunk for buffer in buffers).items()
        ]


def shards_of(config: PlanConfig, sizes: Sizes, count: int, first_block: int) -> Shards:
    """Return how the base is sharded over `count` processes."""
    description = sizes.description
    by_bits = config.base_bits < 16
    head = config.pack_head
    small = sizes.quantized(as_stored=config.mapped, head=head) if by_bits else ()
    quantized = {layer.path for layer in small}

    def buffer(layers: Iterable[Layer]) -> Buffer:
        tensors = (
            size for layer in layers for size in _tensors(config, layer, layer.path in quantized)
        )
        return Buffer(tuple(tensors), count)

    embedding, output = description.embedding, description.head
    is_tied = output is None or output.tied_to is not None
    first = buffer([embedding] if embedding else [])
    last = first if is_tied or output is None else buffer([output])
    blocks = [buffer(layers) for layers in description.by_block]
    used = {layer.path for layers in description.by_block for layer in layers}
    used |= {layer.path for layer in (embedding, output) if layer is not None}
    rest = sum(layer.parameters for layer in description.layers if layer.path not in used)
    return Shards((first, *blocks, last), rest * config.width, is_tied, first_block)


def _tensors(config: PlanConfig, layer: Layer, quantized: bool) -> list[int]:
    """Return the bytes of each tensor that a layer keeps."""
    sizes = []
    for weight in layer.weights():
        if not quantized or weight.ndim < 2:
            sizes.append(weight.numel() * config.width)
            continue
        *experts, rows, columns = layer.oriented
        sizes += _quantized(config, rows, columns) * math.prod(experts)
    return sizes


def _quantized(config: PlanConfig, rows: int, columns: int) -> list[int]:
    """Return the bytes of the tensors of one quantized matrix: codes and scales."""
    numbers = rows * columns
    if config.base_bits == 8:
        return [numbers, rows * FLOAT32]
    scales = -(numbers // -BLOCK)
    return [-(numbers // -2), scales, -(scales // -BLOCK_OF_SCALES) * FLOAT32]


def _aligned(size: int) -> int:
    return -(size // -ALIGNED) * ALIGNED
