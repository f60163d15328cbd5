"""The directory of a training run: what its files are called, and what they hold. Without torch.

`veneer tune` writes it, the server and the command line read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError
from veneer.files import disk_errors, read_json, write_json, write_text

DEFAULT_OUT = Path("dist/finetuning_results")
METRICS = "metrics.jsonl"
LAUNCH = ".launch"
STATE, TENSORS = "state.json", "state.safetensors"  # of a checkpoint


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, below `path`. Reading is forgiving: what is not there is empty."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The run's settings, as YAML: `veneer tune --config` takes them."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """A JSON line for each step and each evaluation, written as they happen."""
        return self.path / METRICS

    @property
    def progress(self) -> Path:
        """How many steps the run has, and how it ended."""
        return self.path / "progress.json"

    @property
    def samples(self) -> Path:
        """A JSON line for each answer that a run on samples has drawn, with its rewards."""
        return self.path / "samples.jsonl"

    @property
    def samples_page(self) -> Path:
        """Some of these answers, as a page."""
        return self.path / "samples.html"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def picture(self) -> Path:
        """The curves of loss, drawn."""
        return self.path / "loss.png"

    @property
    def faults(self) -> Path:
        """A line for each fault of the data, where these are too many to be shown."""
        return self.path / "faults.txt"

    @property
    def duplicates(self) -> Path:
        """A line for each row that was left out because an earlier one is equal."""
        return self.path / "duplicates.txt"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    def adapter(self, method: str = "lora") -> Path:
        """Where the adapter alone goes."""
        return self.path / f"{method}_adapter"

    def merged(self, method: str = "lora") -> Path:
        """Where the merged model goes."""
        return self.path / f"{method}_merged"

    def write_recipe(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, in their order."""
        import yaml

        write_text(self.recipe, yaml.safe_dump(dict(settings), sort_keys=False))

    def read_recipe(self) -> dict[str, Any]:
        """Return the settings; none where the file is missing or damaged."""
        import yaml

        try:
            settings = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def write_progress(self, *, steps: int, ended: str | None = None, **more: str) -> None:
        """Write how many steps the run has and how it ended.

        ended: finished, diverged, patience, interrupted or failed; None while it goes on, and
            after a kill
        more: the `verdict` on its training, and `why`, the error by which it failed
        """
        write_json(self.progress, {"steps": steps, "ended": ended, **more})

    def read_progress(self) -> dict[str, Any]:
        """Return {"steps": ..., "ended": ...}, with the "verdict" where there is one and "why" of a
        run that failed; nothing where the file is missing or damaged."""
        try:
            return read_json(self.progress)
        except AdapterError:
            return {}

    def write_launch(self, launch: str) -> None:
        """Write which launch of processes began the run, or went on with it."""
        write_text(self.path / LAUNCH, launch)

    def read_launch(self) -> str | None:
        """Return which launch of processes it was, None where that is not known."""
        try:
            return (self.path / LAUNCH).read_text(encoding="utf-8")
        except OSError:
            return None

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Keep the lines up to a step: a run that goes on from there repeats what came after.

        A run that starts, at step 0, repeats its evaluation before the first step too.
        """
        lines = [line for line in self.read_metrics() if line["step"] <= step] if step else []
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics, up to one that was cut off in writing."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """Return the checkpoints below a directory of checkpoints, by step."""
    return {
        int(match[1]): place
        for place in directory.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", place.name))
    }
