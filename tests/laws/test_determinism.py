"""The same run twice gives the same bits: every kind of adapter, in this process and in another."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import veneer
from support.interrupted import LENGTHS
from support.kinds import KINDS, Kind, each_kind, is_first
from veneer.checksums import sum_of
from veneer.training.checkpoint import TENSORS
from veneer.training.events import Evaluated, Step


def bits_of_a_run(kind: Kind, place: Path, dtype: torch.dtype) -> str:
    """Return a hash of the losses of a short run, and of all that its last checkpoint holds."""
    model = kind.attached(kind.base(dtype), seed=0)
    course = veneer.TrainConfig(
        epochs=1, lr=0.02, tokens_per_step=40, tokens_per_batch=20, **kind.training
    )
    losses = []
    for event in veneer.train(
        model, kind.rows(LENGTHS), course, held_out=kind.rows([9, 14], seed=1), directory=place
    ):
        if isinstance(event, Step):
            losses.append(event.loss)
        elif isinstance(event, Evaluated):
            losses.append(event.eval_loss)
    last = max(place.glob("step-*"))
    text = json.dumps([losses, sum_of(last / TENSORS)])
    return hashlib.sha256(text.encode()).hexdigest()


def is_lora(kind: Kind) -> bool:
    return kind is next(each for each in KINDS if each.name == "lora")


@each_kind(is_first, fast=is_lora)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice(kind, dtype, tmp_path):
    first = bits_of_a_run(kind, tmp_path / "first", dtype)
    torch.manual_seed(12345)  # what came before, and where memory lies, decides nothing
    between = [torch.rand(1013 + 64 * i) for i in range(20)]
    assert bits_of_a_run(kind, tmp_path / "second", dtype) == first
    del between


@pytest.mark.slow
def test_in_another_process(tmp_path):
    """Whose hashes of strings are others, and with them the order of sets."""
    names = sorted(str(kind) for kind in KINDS if is_first(kind))
    hashes = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path / seed)],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        hashes.append(json.loads(done.stdout.splitlines()[-1]))
    assert sorted(hashes[0]) == names
    assert hashes[0] == hashes[1]


if __name__ == "__main__":
    home = Path(sys.argv[1])
    print(
        json.dumps(
            {
                str(kind): bits_of_a_run(kind, home / str(number), torch.float32)
                for number, kind in enumerate(KINDS)
                if is_first(kind)
            }
        )
    )
