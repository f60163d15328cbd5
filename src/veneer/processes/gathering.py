"""One buffer of bytes from what each process holds of it, while the processes go on computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from veneer.processes.world import World, exchange

# Under its name before torch 2.13 a later torch warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Gathering:
    """An exchange that has begun."""

    works: Sequence[Any]  # torch.distributed's

    def wait(self) -> None:
        """Return when all bytes are there. Raises LostProcess where another process has ended."""
        with exchange():
            for work in self.works:
                work.wait()


def begin_gathering(own: Tensor, whole: Tensor, world: World) -> Gathering:
    """Begin to fill `whole` with what every process has in `own`, in the order of their ranks.

    own (bytes,), whole (size · bytes,). Every process must begin the same, in the same order.
    Raises LostProcess where another process has ended.
    """
    world.sent.count("shards", own)
    pieces = whole.view(world.size, -1)
    pieces[world.rank] = own
    with exchange():
        if dist.get_backend() != "gloo":
            return Gathering([_all_gather(whole, own, async_op=True)])
        # Gloo's own gather is slower and takes twice the memory (docs/adr/0007-own-sharding.md).
        works = [dist.broadcast(p, src=rank, async_op=True) for rank, p in enumerate(pieces)]
        return Gathering(works)
