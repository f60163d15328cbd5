"""MLflow: a server, a database, or its files in a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from veneer.training.tracking.tracker import Point

EXPERIMENT = "veneer"
MOST_METRICS = 1000  # in one request
LONGEST = 6000  # characters of a parameter that MLflow takes
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


class MLflow:
    """Writes to `place`, an address or a directory; where it is empty to MLFLOW_TRACKING_URI, else
    below the run's directory. The experiment is MLFLOW_EXPERIMENT_NAME, or veneer."""

    name = "MLflow"

    def __init__(self, place: str, out: Path) -> None:
        address = place or os.environ.get("MLFLOW_TRACKING_URI") or str(out / "mlflow")
        if "://" not in address:
            # MLflow wants to be asked for its files by name since its version 3.7.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = Path(address).absolute().as_uri()
        self.address, self.title = address, out.name
        self.client: MlflowClient | None = None
        self.run = ""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start a run, with the settings as its parameters."""
        self.client = MlflowClient(self.address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=self.title).info.run_id
        params = [Param(key, str(value)[:LONGEST]) for key, value in settings.items()]
        self.client.log_batch(self.run, params=params)

    def log(self, points: Sequence[Point]) -> None:
        """Send all numbers, as many in a request as a server takes."""
        assert self.client is not None
        metrics = [
            Metric(name, value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.numbers.items()
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.run, metrics=metrics[first : first + MOST_METRICS])

    def end(self, outcome: str) -> None:
        """End the run."""
        assert self.client is not None
        self.client.set_terminated(self.run, STATUS[outcome])
