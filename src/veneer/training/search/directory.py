"""A search's directory: what may be in it, and what the best trial leaves there as a run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from veneer.errors import ConfigError
from veneer.files import remove_directory, write_text
from veneer.run_directory import METRICS, RunDirectory
from veneer.training import preflight
from veneer.training.results import clear_results, clear_state
from veneer.training.search.result import NUMBERS, PICTURE, TABLE, TrialResult

STUDY, TRIALS = "study.db", "trials"


def check_directory(out: Path, *, resume: bool, force: bool) -> None:
    """Raise ConfigError where a search may not be in `out`."""
    run, study = RunDirectory(out), out / STUDY
    preflight.check_directory(run, may_hold_a_run=True)
    if resume and not study.exists():
        raise ConfigError(
            f"There is no search in {out} to go on with (no {STUDY}). Name its directory by --out, "
            "or leave out --resume for a new one."
        )
    if resume or force:
        return
    if study.exists():
        raise ConfigError(
            f"{out} holds an earlier search. Go on with it by --resume, replace it by --force, or "
            "name another place by --out."
        )
    earlier = (run.adapter(), run.merged(), run.checkpoints, run.metrics, *_trials(out))
    if names := [place.name for place in earlier if place.exists()]:
        raise ConfigError(
            f"{out} holds an earlier run ({', '.join(names)}). Replace it by --force, or name "
            "another place by --out."
        )


def clear(out: Path) -> None:
    """Remove an earlier search, and what its best trial, or a run, left."""
    run = RunDirectory(out)
    journal = f"{STUDY}-journal"  # SQLite's, after a kill
    for name in (STUDY, journal, TABLE, NUMBERS, PICTURE, run.picture.name):
        (out / name).unlink(missing_ok=True)
    for trial in _trials(out):
        remove_directory(trial)
    with suppress(OSError):  # where other things are in it, or it is not there
        (out / TRIALS).rmdir()
    clear_state(run)
    clear_results(run, keep=())


def _trials(out: Path) -> list[Path]:
    """Return the directories of an earlier search's trials."""
    places = sorted((out / TRIALS).glob("[0-9]*"))
    return [place for place in places if place.name.isdigit() and place.is_dir()]


def leave_best(best: TrialResult, out: Path) -> None:
    """Leave the recipe and the metrics of the best trial beside its adapter."""
    trial, run = RunDirectory(out / TRIALS / best.name), RunDirectory(out)
    run.write_recipe(trial.read_recipe() | {"out": str(out)})
    write_text(run.metrics, (trial.path / METRICS).read_text(encoding="utf-8"))
    progress = trial.read_progress()
    run.write_progress(**{"steps": best.steps, **progress})
