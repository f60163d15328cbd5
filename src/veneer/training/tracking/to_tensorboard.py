"""TensorBoard: files of events in a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from veneer.run_directory import RunDirectory
from veneer.training.tracking.tracker import Point


class TensorBoard:
    """Writes below `place`, the run's tensorboard/ where it is empty."""

    name = "TensorBoard"

    def __init__(self, place: str, out: Path) -> None:
        self.directory = Path(place) if place else RunDirectory(out).tensorboard
        self.writer: SummaryWriter | None = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open the file, with the settings as a text."""
        self.writer = SummaryWriter(str(self.directory))
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        self.writer.add_text("recipe", f"```yaml\n{text}```")

    def log(self, points: Sequence[Point]) -> None:
        """Add points to the curves."""
        assert self.writer is not None
        for point in points:
            for name, value in point.numbers.items():
                self.writer.add_scalar(name, value, point.step, point.time)

    def end(self, outcome: str) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
