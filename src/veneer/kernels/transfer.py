"""Tensors between the host and a device, without making either wait for the other.

A copy from ordinary memory, or into it, waits until the device has done all that it was asked for
before. A copy from or into pinned memory is only put into the device's queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PINNED = ("cuda", "xpu")  # devices that read pinned memory by themselves


def has_queue(device: torch.device) -> bool:
    """Return whether the host can go on while a device works, and hear of it later."""
    return device.type in PINNED


def sent(values: Sequence[Any] | Tensor, device: torch.device | None) -> Tensor:
    """Return numbers of the host, a tensor or (nested) lists, as a tensor on `device`."""
    x = values if isinstance(values, Tensor) else torch.tensor(values)
    if device is None or device.type not in PINNED:
        return x.to(device)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    # torch frees pinned memory only after the copies from it.
    return pinned.to(device, non_blocking=True)


def sent_together(
    hosts: Sequence[Tensor | NDArray[np.int64]], device: torch.device | None
) -> list[Tensor]:
    """Return tensors of the host, of one dtype, on a device; where it has a queue, by one copy."""
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in hosts]
    if device is None or not has_queue(device):
        return [sent(x, device) for x in tensors]
    together = sent(torch.cat([x.flatten() for x in tensors]), device)
    pieces = together.split([x.numel() for x in tensors])
    return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


class OnTheWay:
    """Tensors of one device that are being copied to the host.

    `arrived` waits for the copies, and for nothing that the device is asked for after them; without
    a queue it copies, and waits for all.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.Event | None = None
        self._host = [self._begin(tensor) for tensor in tensors]
        if self._host and tensors[0].device.type in PINNED:
            device = tensors[0].device
            self._event = torch.Event(device)
            # By itself it takes the stream of the thread's current device, which may be another.
            self._event.record(torch.accelerator.current_stream(device))

    def _begin(self, tensor: Tensor) -> Tensor:
        if tensor.device.type not in PINNED:
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def arrived(self) -> list[Tensor]:
        """Return the tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.cpu() for tensor in self._host]
