"""Which trackers there are, by the name that --track takes. Imports none of their libraries."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from veneer.errors import ConfigError, VeneerError, nearest
from veneer.training.tracking.tracker import Tracker

# By name: the module and class, and the package that it needs.
TRACKERS = {
    "tensorboard": ("to_tensorboard:TensorBoard", "tensorboard"),
    "mlflow": ("to_mlflow:MLflow", "mlflow"),
    "wandb": ("to_wandb:WandB", "wandb"),
}


def trackers(specs: Iterable[str], out: Path) -> list[Tracker]:
    """Return the trackers that texts such as "mlflow" or "tensorboard:curves" name.

    out: the run's directory, below which they write unless the text says where. Raises ConfigError
    for names that are none or come twice, VeneerError where a library is missing; all at once.
    """
    wrong, missing = [], []
    chosen: dict[str, str] = {}
    named: set[str] = set()
    for spec in specs:
        name, _, place = spec.partition(":")
        if name not in TRACKERS:
            wrong.append(f"{name!r} is no tracker{nearest(name, TRACKERS)}")
        elif name in named:
            wrong.append(f"{name} is named twice")
        elif find_spec(TRACKERS[name][1]) is None:
            missing.append(name)
        else:
            chosen[name] = place
        named.add(name)
    if wrong:
        known = ", ".join(TRACKERS)
        raise ConfigError(f"--track cannot be followed: {'; '.join(wrong)}. There are {known}.")
    if missing:
        extras = ",".join("track" if name == "tensorboard" else name for name in missing)
        raise VeneerError(f"--track {' '.join(missing)} needs: pip install 'veneer[{extras}]'")
    return [_make(name, place, out) for name, place in chosen.items()]


def _make(name: str, place: str, out: Path) -> Tracker:
    module, _, kind = TRACKERS[name][0].partition(":")
    tracker: Tracker = getattr(import_module(f"veneer.training.tracking.{module}"), kind)(
        place, out
    )
    return tracker
