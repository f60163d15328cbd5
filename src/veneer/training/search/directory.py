"""A search's directory: what may be in it, and what the best trial leaves there as a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from veneer.errors import ConfigError
from veneer.files import remove_directory, write_text
from veneer.formats import native
from veneer.run_directory import METRICS, RunDirectory
from veneer.training.search.result import NUMBERS, PICTURE, TABLE, TrialResult

STUDY, TRIALS = "study.db", "trials"


def check_directory(out: Path, *, resume: bool, force: bool) -> None:
    """Raise ConfigError where a search may not be in `out`."""
    study = out / STUDY
    if resume and not study.exists():
        raise ConfigError(
            f"There is no search in {out} to go on with (no {STUDY}). Name its directory by --out, "
            "or leave out --resume for a new one."
        )
    if study.exists() and not (resume or force):
        raise ConfigError(
            f"{out} holds an earlier search. Go on with it by --resume, replace it by --force, or "
            "name another place by --out."
        )
    if not study.exists() and (adapter := RunDirectory(out).adapter()).exists() and not force:
        raise ConfigError(
            f"{out} holds an earlier run ({adapter.name}). Replace it by --force, or name another "
            "place by --out."
        )


def clear(out: Path) -> None:
    """Remove an earlier search, and what its best trial left."""
    run = RunDirectory(out)
    for file in (out / STUDY, out / TABLE, out / NUMBERS, out / PICTURE):
        file.unlink(missing_ok=True)
    for file in (run.recipe, run.metrics, run.progress, run.picture):
        file.unlink(missing_ok=True)
    shutil.rmtree(out / TRIALS, ignore_errors=True)
    if (run.adapter() / native.config_name("lora")).is_file():
        remove_directory(run.adapter())


def leave_best(best: TrialResult, out: Path) -> None:
    """Leave the recipe and the metrics of the best trial beside its adapter."""
    trial, run = RunDirectory(out / TRIALS / best.name), RunDirectory(out)
    run.write_recipe(trial.read_recipe() | {"out": str(out)})
    write_text(run.metrics, (trial.path / METRICS).read_text(encoding="utf-8"))
    progress = trial.read_progress()
    run.write_progress(**{"steps": best.steps, **progress})
