"""Kernels in Triton, run on a card where there is one, and else by Triton's interpreter."""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/conftest.py sets it
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def needs_triton(test: Any) -> Any:
    """Mark a test, or let it be skipped where Triton is not installed."""
    for mark in MARKS:
        test = mark(test)
    return test


MARKS = [
    pytest.mark.triton,
    pytest.mark.skipif(
        find_spec("triton") is None, reason="triton is not there; make proof-gpu installs it"
    ),
]
# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
