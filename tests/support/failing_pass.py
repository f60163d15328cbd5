"""`veneer`, whose second process runs out of memory in its second pass.

A program, which processes that it starts read anew.
"""

import itertools
import os
from typing import Any

import torch

from veneer.cli import main

_backward, _passes = torch.Tensor.backward, itertools.count()


def _failing(loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
    if os.environ.get("RANK") == "1" and next(_passes):
        raise MemoryError("no memory is left")
    _backward(loss, *arguments, **options)


torch.Tensor.backward = _failing  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
