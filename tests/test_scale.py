"""The recipes for several processes and machines: what they say is so, and they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import veneer
from support.random_adapters import logits
from support.recipes import (
    SCALE,
    commands_of_manifest,
    environment,
    free_port,
    losses,
    manifest,
    run_together,
    small_run,
    tune_commands,
)
from support.tiny_models import tiny
from veneer.cli.app import app

FLAGS = ["--targets=all", "--rank=2", "--epochs=2", "--tokens-per-step=100", "--save-every=2"]
FLAGS += ["--dtype=float32"]
BFLOAT16 = 2**-8  # its rounding, where a recipe leaves the dtype to the processor
SCRIPTS = sorted(path.name for path in SCALE.iterdir() if path.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted(path.name for path in SCALE.glob("kubernetes-*.yaml"))


def test_every_recipe_has_flags_that_there_are():
    names = []
    for name, command in tune_commands():
        app.parse_args(command, exit_on_error=False, print_error=False)
        names.append(name)
    assert names == sorted([*SCRIPTS, *MANIFESTS])


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", SCALE / name], check=True)


def test_manifests_ask_for_as_many_machines_everywhere():
    job = manifest("kubernetes-pytorchjob.yaml")["spec"]
    policy, worker = job["elasticPolicy"], job["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    container = worker["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"  # the operator looks for this one
    assert container["resources"]["limits"]["nvidia.com/gpu"] == policy["nProcPerNode"]
    trainer = manifest("kubernetes-trainjob.yaml")["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A directory with a base, rows, and the result of one process."""
    place = tmp_path_factory.mktemp("alone")
    base, data = small_run(place)
    command = [sys.executable, "-m", "veneer", "tune", base, data, "--out=result", *FLAGS]
    run_together(command, [{}], place)
    return place


def assert_same_run(out: Path, alone: Path) -> None:
    one = losses(alone / "result")
    assert len(one) > 2
    assert losses(out) == pytest.approx(one, rel=1e-4)
    fresh = tiny("llama")
    veneer.load(fresh, out)
    assert not torch.equal(logits(fresh), logits(tiny("llama")))


@pytest.mark.slow
def test_torchrun_by_hand_on_one_machine(alone, tmp_path):
    out = tmp_path / "result"
    command = [SCALE / "torchrun.sh", alone / "models/Qwen3-8B", alone / "rows.jsonl"]
    machine = {"PER_NODE": "2", "HEAD": f"127.0.0.1:{free_port()}"}
    run_together([*command, f"--out={out}", *FLAGS], [machine], tmp_path)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_torchrun_by_hand_on_two_machines(alone, tmp_path):
    out = tmp_path / "result"
    command = [SCALE / "torchrun.sh", alone / "models/Qwen3-8B", alone / "rows.jsonl"]
    machine = {"PER_NODE": "1", "NODES": "2", "HEAD": f"127.0.0.1:{free_port()}"}
    run_together([*command, f"--out={out}", *FLAGS], [machine, machine], tmp_path)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_slurm(alone, tmp_path):
    """With a scheduler that knows two machines, both of which are this one."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stubs = {
        "scontrol": 'test "$*" = "show hostnames machines[1-2]" && echo 127.0.0.1 && echo other',
        "srun": '"$@" & first=$!; "$@"; second=$?; wait $first && exit $second',
    }
    for name, body in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    out = tmp_path / "result"
    common = environment()
    machine = {
        "PATH": f"{programs}{os.pathsep}{common['PATH']}",
        "PORT": free_port(),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "machines[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    command = ["bash", SCALE / "slurm.sbatch", alone / "models/Qwen3-8B", alone / "rows.jsonl"]
    # Started again by SLURM: before there was anything, and after its end, so that nothing is lost.
    again = machine | {"SLURM_RESTART_COUNT": "1"}
    for _ in range(2):
        run_together([*command, out, *FLAGS], [again], tmp_path)
        assert_same_run(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes(name, alone, tmp_path):
    """The pods' command line as it is, but for the volume's place, with the variables that the
    operator sets."""
    small_run(tmp_path)
    command = [word.replace("/veneer/", f"{tmp_path}/") for word in commands_of_manifest(name)]
    port = free_port()
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    if "pytorchjob" in name:
        rendezvous = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
        pods = [common | rendezvous | {"PET_RDZV_ID": "veneer"}] * 2
    else:
        address = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        pods = [common | address | {"PET_NODE_RANK": rank} for rank in "01"]
    run_together(command, pods, tmp_path)
    one = [sys.executable, "-m", "veneer", *command[command.index("tune") :]]
    ours = losses(tmp_path / "result")
    run_together([*one, "--force"], [{}], tmp_path)
    assert ours == pytest.approx(losses(tmp_path / "result"), rel=BFLOAT16)


@pytest.mark.slow
def test_accelerate_launch(alone, tmp_path):
    """With the settings of the recipe, but for two processes on a CPU."""
    settings = manifest("accelerate-ddp.yaml") | {"use_cpu": True, "num_processes": 2}
    (tmp_path / "config.yaml").write_text(str(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    script = [SCALE / "sft.py", alone / "models/Qwen3-8B", alone / "rows.jsonl", "result"]
    command = [*launch, "--config_file", "config.yaml", *script, "--cpu", "--steps=2", "--rows=2"]
    run_together(command, [{}], tmp_path)
    fresh = tiny("llama")
    veneer.load(fresh, tmp_path / "result" / "adapter")
    assert not torch.equal(logits(fresh), logits(tiny("llama")))
