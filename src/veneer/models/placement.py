"""Where the weights of a base go as they come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from veneer.models.block_buffers import BufferedBase
from veneer.models.offload import offloader
from veneer.models.sharded import sharder
from veneer.processes.world import ALONE, World
from veneer.quant.settings import Offload


@dataclass(frozen=True)
class Placement:
    """To a device, or as they are where that is None; of a world of several processes, a shard of
    each block to each; or `offload` to memory or disk beside the device.

    directory: of a file for what is offloaded to the disk and in no file yet.
    """

    device: torch.device | None = None
    world: World = ALONE
    offload: Offload = "none"
    directory: Path | None = None

    @property
    def is_by_blocks(self) -> bool:
        """Whether blocks are whole on the device only while they are used."""
        return self.world.size > 1 or self.offload != "none"

    @property
    def stays_in_files(self) -> bool:
        """Whether weights are best left in their files until each is placed."""
        return self.world.size > 1 or self.offload == "disk"

    def buffers(self, model: PreTrainedModel) -> BufferedBase | None:
        """Return what moves a model's blocks into buffers, None where they stay whole."""
        if self.offload != "none":
            device = self.device or torch.device("cpu")
            return offloader(model, self.offload, device, directory=self.directory)
        return sharder(model, self.world, self.device) if self.world.size > 1 else None


AS_THEY_ARE = Placement()
