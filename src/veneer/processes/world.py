"""The processes that train together, as one value; a process on its own is a world of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class Sent:
    """Bytes that this process gave to exchanges, by their kind."""

    bytes_of: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, tensor: Tensor) -> None:
        """Count what is exchanged of `tensor`."""
        self.bytes_of[kind] = self.bytes_of.get(kind, 0) + tensor.nbytes

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes_of.values())


@dataclass(frozen=True)
class World:
    """This process among all of a run: `rank` of `size`.

    Every exchange must be made by all processes, in the same order. Sums are SUM and never AVG,
    which gloo has not in all versions (pytorch#162338). Backends: gloo on a CPU, nccl on GPUs.
    """

    rank: int = 0
    size: int = 1
    sent: Sent = field(default_factory=Sent, repr=False, compare=False)

    @classmethod
    def current(cls) -> World:
        """Return the world that torch.distributed knows, or that of one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this process writes what the run leaves on the disk."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, the same bits in each of them."""
        if self.size > 1:
            self.sent.count("sum", tensor)
            dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, alike in shape, as (size, *shape)."""
        if self.size == 1:
            return tensor[None]
        self.sent.count("gather", tensor)
        flat = tensor.new_empty(self.size * tensor.numel())
        dist.all_gather_into_tensor(flat, tensor.contiguous().view(-1))
        return flat.view(self.size, *tensor.shape)

    def share(self, value: T) -> T:
        """Return the value of the process that writes, in every process. It is pickled, between
        processes of one run only: nothing from outside is read so."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        self.add_up(flags)
        return bool(flags)

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the process that writes while the others wait, and return its result in all.

        Raises in every process what `work` raised.
        """
        outcome: tuple[bool, Any] = (False, None)
        if self.writes:
            try:
                outcome = (True, work())
            except Exception as error:
                outcome = (False, error)
        done, result = self.share(outcome)
        if not done:
            raise result
        return result
