"""The recipes of examples/scale: their command lines, and a small cluster to run them on."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model

SCALE = Path(__file__).parents[2] / "examples" / "scale"
SOURCE = Path(__file__).parents[2] / "src"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((SCALE / name).read_text())


def commands_of_manifest(name: str) -> list[str]:
    """Return the command line of a pod."""
    spec = manifest(name)["spec"]
    if "trainer" in spec:
        pod = spec["trainer"]
    else:
        pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    return [*pod["command"], *pod["args"]]


def tune_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the arguments of each `veneer tune` in the recipes, with the file's name."""
    for path in sorted(SCALE.iterdir()):
        if path.suffix == ".yaml" and path.name.startswith("kubernetes"):
            command = commands_of_manifest(path.name)
            yield path.name, command[command.index("tune") :]
        elif path.suffix in (".sh", ".sbatch"):
            script = path.read_text().replace("\\\n", " ")
            again = re.findall(r"AGAIN=\((--.*)\)", script)
            for line in re.findall(r"^.*-m veneer (tune .*)$", script, re.MULTILINE):
                given = "" if '"$MODEL"' in line else "MODEL DATA"
                words = line.replace('"$@"', given).replace('"${AGAIN[@]}"', " ".join(again))
                yield path.name, shlex.split(words)


def small_run(place: Path) -> tuple[Path, Path]:
    """Write a tiny base and rows below `place`, and return both paths."""
    base, data = place / "models" / "Qwen3-8B", place / "rows.jsonl"
    write_model(tiny("llama"), tokenizer(), base)
    rows = [
        {"prompt": "a b c d"[: 1 + i % 7], "completion": "efghijklm"[i % 5 :]} for i in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, data


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process on one of the cluster's machines."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    common = {"PATH": path, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return os.environ | common | {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"} | variables


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_together(
    command: Sequence[object], machines: Sequence[Mapping[str, str]], cwd: Path
) -> None:
    """Run a command once for each machine's environment, all at the same time."""
    words = [str(word) for word in command]
    runs = [
        subprocess.Popen(
            words,
            cwd=cwd,
            env=environment(**each),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for each in machines
    ]
    outputs = [run.communicate(timeout=600)[0].decode() for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output[-5000:]


def losses(out: Path) -> list[float]:
    """Return the losses of a run's steps."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
