"""The memory that fake tensors would take on a card, as torch's caching allocator counts it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from support.fake_card import CARD

ROUNDED = 512  # bytes; as torch's allocator rounds each tensor up (kMinBlockSize)


class CardMemory(TorchDispatchMode):
    """Adds up the storages on the card that are alive, each once: now, and at most.

    What an operation takes within itself is not seen: its workspace.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}

    @contextmanager
    def counting(self) -> Iterator[CardMemory]:
        """Count from here on, with storages that are given and taken memory, and operations that
        are one kernel on a card, as torch's list of its functions (native_functions.yaml) says, but
        several where torch was built without CUDA."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        library = torch.library.Library("aten", "IMPL")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
            library.impl("silu_backward", lambda dy, x: torch.empty_like(x), "CUDA")
        try:
            # A thread of autograd's would need the interpreter to let go of its last fake tensors,
            # as it does not of others, and these would be counted too long.
            with torch.autograd.set_multithreading_enabled(False), self:
                yield self
        finally:
            library._destroy()
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def note(self, tensors: Any) -> None:
        """Count the tensors in a value, however it holds them, on the card."""
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type == CARD.type:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._watched[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
                    self._set(key, storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def _set(self, key: int, size: int) -> None:
        rounded = -(size // -ROUNDED) * ROUNDED
        self.now += rounded - self._sizes.get(key, 0)
        self._sizes[key] = rounded
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._watched[key]
