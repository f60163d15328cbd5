"""Tasks of EleutherAI's harness: read, and evaluated on a model.

A task is a YAML file that names its data, how a row becomes a prompt, and its metrics. Those that
come with the harness take their data from the hub; others lie in a directory with their data.
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm.std import tqdm

from veneer.errors import (
    ConfigError,
    VeneerError,
    VeneerWarning,
    joined,
    listed,
    nearest,
    shortened,
)
from veneer.evaluation.task_code import restricted

SEED = 1234  # of the harness, by which it draws solved examples
PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}  # directories of no tasks, to the harness
BOOTSTRAP = 1000  # resamples, for the standard error of a metric that is no mean


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are evaluated.

    names: of tasks, groups or tags, or YAML files; all of `directory` where there are none.
    directory: where tasks lie with their data; relative paths in their files are from there.
    shots: solved examples before each prompt, as each task says unless given. limit: rows of each
    task. chat: whether prompts go through the chat template, behind the system prompt. allow_code:
    whether the Python runs that the tasks' files name.
    """

    names: Sequence[str] = ()
    directory: Path | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    system: str | None = None
    allow_code: bool = False


@dataclass(frozen=True)
class Metric:
    """What a task measured. error: its standard error, None where it has none. rows: measured.
    choice: the harness's name of what was taken of each answer (`none` where that is all of it)."""

    task: str
    name: str
    choice: str
    value: float
    error: float | None
    higher_is_better: bool | None
    rows: int


def check_tasks(settings: TaskSettings) -> list[str]:
    """Return the names of the tasks that would be evaluated. Raises ConfigError, and warns
    (VeneerWarning) of tasks that take no solved examples where some are asked for."""
    tasks = _load(settings)["tasks"]
    without = sorted(name for name, task in tasks.items() if task.get_config("num_fewshot") == 0)
    if settings.shots and without:
        warnings.warn(
            f"There are no solved examples before the prompts of {listed(without)}, as files say.",
            VeneerWarning,
            stacklevel=2,
        )
    return sorted(tasks)


def evaluate(model: LM, settings: TaskSettings) -> list[Metric]:
    """Return what the tasks measure of a model. Raises ConfigError for tasks that do not load or
    need what is not here, and whatever the model raises."""
    tasks = _load(settings)
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (settings.shots is not None and own != 0):  # 0 is what a task insists on
            task.set_config(key="num_fewshot", value=settings.shots or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(0)  # both as the harness itself does, for tasks that shuffle
    np.random.seed(SEED)
    try:
        with _quiet(), restricted(allow_code=settings.allow_code):
            results = evaluator.evaluate(
                model,
                tasks,
                limit=settings.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                system_instruction=settings.system,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
            )
    except VeneerError:
        raise
    except Exception as error:  # whatever the harness, a task's own code or its data raise
        raise ConfigError(f"The tasks cannot be evaluated: {_text(error)}") from error
    assert results is not None
    return list(_metrics(results))


def _load(settings: TaskSettings) -> Mapping[str, Any]:
    directory = settings.directory
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"There is no directory {directory} of tasks.")
    if directory is None and not settings.names:
        raise ConfigError("No tasks are named; name some, or a directory that holds some.")
    with _quiet(), restricted(allow_code=settings.allow_code):
        own = [] if directory is None else [directory.absolute()]
        if unreadable := [problem for each in own for problem in _unreadable(each)]:
            raise ConfigError(f"These tasks cannot be read: {joined(unreadable)}.")
        manager = TaskManager(include_path=own, include_defaults=False)
        names = list(settings.names) or manager.all_subtasks
        if not names:
            raise ConfigError(f"{directory} holds no tasks: no .yaml file in it names one.")
        if manager.all_groups or any(not _known(manager, name) for name in names):
            # Reading all that come with the harness takes seconds, so only where one may be meant.
            manager = TaskManager(include_path=own)
        if unknown := [name for name in names if not _known(manager, name)]:
            each = [f"{name!r}{nearest(name, manager.all_tasks)}" for name in unknown]
            raise ConfigError(
                f"There are no such tasks: {', '.join(each)}. A task is a name that the harness "
                "has, one in the directory of tasks, or a .yaml file."
            )
        specs = [str(Path(name).absolute()) if _is_file(name) else name for name in names]
        try:
            with _beside(directory):
                return manager.load(specs)
        except VeneerError:
            raise
        except Exception as error:  # whatever the harness, a task's own code or a data set raises
            raise ConfigError(
                f"The tasks {', '.join(names)} cannot be read: {_text(error)} (Where there is no "
                "hub, a task names local files: dataset_path: json, dataset_kwargs: data_files: "
                "...)"
            ) from error


def _unreadable(directory: Path) -> Iterator[str]:
    """Yield what is wrong with files of tasks, which the harness would pass over in silence."""
    owners: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.yaml")):
        if any(each.name in PASSED_OVER for each in (path, *path.parents)):
            continue
        try:
            name = load_yaml(path, resolve_func=False).get("task")
        except Exception as error:  # whatever a file, or one that it includes, holds
            yield f"{path}: {_text(error)}"
            continue
        if isinstance(name, str) and (other := owners.setdefault(name, path)) != path:
            yield f"{path}: {other} has a task of this name already, {name!r}"


def _known(manager: TaskManager, name: str) -> bool:
    return name in manager.task_index or _is_file(name)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 400)}"


def _beside(directory: Path | None) -> Any:
    """Return a context in which relative paths are from the directory of tasks."""
    return nullcontext() if directory is None else chdir(directory)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness prints from the output, and its bars from the terminal, for which it
    has no setting; and let it fork no processes, which may hang beside torch's threads."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
            patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)),
            redirect_stdout(sys.stderr),
        ):
            yield
    finally:
        logger.setLevel(level)


def _metrics(results: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of the harness's results, groups after their tasks."""
    rows = {name: int(n["effective"]) for name, n in results.get("n-samples", {}).items()}
    higher = results.get("higher_is_better", {})
    for task, values in results["results"].items():
        for key, value in values.items():
            name, comma, choice = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{choice}")
            has_error = isinstance(error, int | float) and math.isfinite(error)
            yield Metric(
                task,
                name,
                choice,
                float(value),
                float(error) if has_error else None,
                (higher.get(task) or {}).get(name),
                int(values.get("sample_len") or rows.get(task, 0)),
            )
