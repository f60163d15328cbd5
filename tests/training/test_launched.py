"""Trainer and SFTTrainer in two processes, started by `accelerate launch` with DDP and FSDP2: what
they train and save is what one process does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import yaml
from peft import PeftModel

import veneer
from support.closeness import assert_no_further, assert_same_logits
from support.launched import CASES, SAVED, STEPS, adapter_tensors, train
from support.random_adapters import logits, same
from support.recipes import manifest
from support.tiny_models import tiny

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "support" / "launched.py"
SHARDED = manifest("accelerate-fsdp2.yaml")
WHOLE = SHARDED["fsdp_config"] | {"fsdp_state_dict_type": "FULL_STATE_DICT"}
WAYS = {
    "ddp": manifest("accelerate-ddp.yaml"),
    "fsdp2": SHARDED | {"fsdp_config": WHOLE},
    "fsdp2, shards on disk": SHARDED,
}
FROM_SHARDS = ["dora", "new tokens", "tokens, resumed"]
EVERYWHERE = [name for name in CASES if name != "tokens, resumed"]  # not from whole state dicts
NAMES = {way: FROM_SHARDS if "disk" in way else EVERYWHERE for way in WAYS}


def launched(way: str) -> Path:
    """Run all cases in two processes, once, and return where their files are."""
    place, problem = _launched(way)
    assert not problem, problem
    return place


@functools.cache
def _launched(way: str) -> tuple[Path, str]:
    place = Path(mkdtemp())
    config = WAYS[way] | {"use_cpu": True, "num_processes": 2}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(place / "config.yaml"), str(WORKER), str(place)]
    paths = os.pathsep.join([str(WORKER.parents[1]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *NAMES[way]], env=environment, capture_output=True, text=True, timeout=900
    )
    return place, run.stderr[-5000:] if run.returncode else ""


@functools.cache
def alone(name: str, wide: bool = False) -> tuple[Path, torch.Tensor]:
    """Run a case in this process, and return where its files are, and its losses."""
    place = Path(mkdtemp())
    return place, torch.tensor(train(CASES[name], place, wide=wide), dtype=torch.float64)


every_case = pytest.mark.parametrize(
    ("way", "name"), [(way, name) for way in WAYS for name in NAMES[way]]
)


@every_case
def test_two_processes_train_as_one_does(way, name):
    place = launched(way) / name
    (peer, losses), (reference, exact) = alone(name), alone(name, wide=True)
    ours = torch.tensor(json.loads((place / "losses.json").read_text()), dtype=torch.float64)
    assert_no_further(ours, losses, exact, "losses")
    for step in (f"checkpoint-{SAVED}", f"checkpoint-{STEPS}", "."):
        trained, one, wide = (
            adapter_tensors(files / step / "adapter")
            for files in (place / "whole", peer, reference)
        )
        assert trained.keys() == one.keys() == wide.keys() != set()
        longest = max(tensor.norm().item() for tensor in wide.values())
        for key, expected in wide.items():
            where = f"{key} at {step}"
            assert_no_further(trained[key], one[key], expected, where, least=longest)


@every_case
def test_a_resumed_run_equals_the_undisturbed_one(way, name):
    if not CASES[name].resumes:
        return
    place = launched(way) / name
    whole, resumed = (adapter_tensors(place / run / "adapter") for run in ("whole", "resumed"))
    assert same(resumed, whole)
    assert not same(adapter_tensors(place / "whole" / f"checkpoint-{SAVED}" / "adapter"), whole)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["dora", "tokens", "modules to save"])
def test_peft_reads_what_two_processes_saved(way, name):
    adapter = launched(way) / name / "whole" / "adapter"
    ours, theirs = tiny("llama"), PeftModel.from_pretrained(tiny("llama"), adapter)
    veneer.load(ours, adapter)
    assert_same_logits(logits(theirs), ours, logits)
    assert not torch.equal(logits(ours), logits(tiny("llama")))
