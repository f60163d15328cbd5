"""Kernels in Triton, run on a card where there is one, and else by Triton's interpreter.

Imported before any kernel: Triton asks for its interpreter where a kernel is defined.
"""

import os
from importlib.util import find_spec

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

needs_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(
        find_spec("triton") is None, reason="triton is not there; make proof-gpu installs it"
    ),
]
# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16]
