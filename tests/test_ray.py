"""Ray Train, run with two local workers in an environment of its own (make proof-ray)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import veneer
from support.random_adapters import logits
from support.recipes import SCALE, losses, run_together, small_run
from support.tiny_models import tiny

PYTHON = Path(__file__).parents[1] / ".venv-ray" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not there; make proof-ray sets it up"),
]
# A cluster of this process alone, which listens on no address but that of this machine.
LOCAL = """
import ray, runpy, sys
ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_workers_train_as_one_process_does(tmp_path):
    base, data = small_run(tmp_path)
    steps = ["--steps=3", "--save-every=2"]
    command = [PYTHON, "-c", LOCAL, SCALE / "ray_train.py", base, data, tmp_path / "out", *steps]
    machine = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    machine |= {"RAY_raylet_start_wait_time_s": "300"}  # on a machine with much else to do
    run_together([*command, "--workers=2"], [machine], tmp_path)
    alone = [sys.executable, "-m", "veneer", "tune", base, data, "--out=alone", *steps]
    run_together([*alone, "--rank=8", "--targets=all"], [{}], tmp_path)
    # The processor chooses the dtype; bfloat16 rounds to 2⁻⁸.
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=2**-8)
    fresh = tiny("llama")
    veneer.load(fresh, tmp_path / "out")
    assert not torch.equal(logits(fresh), logits(tiny("llama")))
