"""Kernels in Triton become code of cards: the interpreter takes much that a card does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.interpreted import MARKS

pytestmark = [*MARKS, pytest.mark.slow]
TESTS = Path(__file__).parents[1]
AMPERE, HOPPER, GEFORCE_50 = 80, 90, 120


@pytest.mark.parametrize(
    ("capability", "dtype"), [(AMPERE, "fp16"), (HOPPER, "bf16"), (GEFORCE_50, "fp32")]
)
def test_every_kernel_compiles_for_a_card(capability, dtype, tmp_path):
    command = [sys.executable, TESTS / "support" / "compiled_kernels.py", str(capability), dtype]
    places = [TESTS, TESTS.parent / "src"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    files = (TESTS.parent / "src" / "veneer" / "kernels").glob("triton_*.py")
    kernels = sum(file.read_text().count(") -> None:\n") for file in files)
    assert len({name.split(" ")[0] for name in sizes}) == kernels  # all that write anything
    assert all(size > 0 for size in sizes.values())
