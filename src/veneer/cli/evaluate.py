"""`veneer evaluate`: tasks of a harness, or win rates against another adapter or the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from veneer.cli.against import BASE, AgainstFlags, compare_answers, named_adapters
from veneer.cli.console import new_table, print_json, print_wide, show_doing
from veneer.cli.flags import BaseFlags, Flat, NamedModel, Switch, System
from veneer.cli.loading import base_of, load_base
from veneer.errors import Checks, ConfigError
from veneer.generate.sampling import Sampling

if TYPE_CHECKING:
    from veneer.evaluation.tasks import Metric, TaskSettings

EXTRA = "Tasks are evaluated by EleutherAI's harness: pip install 'veneer[evaluate]'"


@dataclass(frozen=True)
class TaskFlags:
    """Which tasks are evaluated, and how."""

    tasks: list[str] | None = None
    """Tasks, groups or tags of EleutherAI's harness, or YAML files of such tasks; several with
    commas, or by --tasks again."""
    tasks_from: Path | None = None
    """Directory of tasks: YAML files, and the data that they name from there. All are evaluated
    unless --tasks names some."""
    allow_code: Switch = False
    """Run the Python functions that files of tasks name (!function). Those that come with the
    harness need no permission."""
    num_fewshot: int | None = None
    """Solved examples before each prompt; as each task says unless given."""
    limit: int | None = None
    """Rows of each task; all unless given."""
    chat_template: Switch = False
    """Put prompts through the model's chat template."""
    with_base: Switch = False
    """Evaluate the base alone too, beside the adapters."""


def evaluate(
    model: NamedModel = None,
    /,
    *,
    adapter: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="Adapter over the base, DIRECTORY or NAME=DIRECTORY; several are evaluated side "
            "by side.",
        ),
    ] = None,
    tasks: Annotated[TaskFlags, Flat] = TaskFlags(),
    comparison: Annotated[AgainstFlags, Flat] = AgainstFlags(),
    system: System = None,
    as_json: Annotated[Switch, Parameter(name="--json", help="Print the results as JSON.")] = False,
    sampling: Annotated[Sampling, Flat] = Sampling(),
    loading: Annotated[BaseFlags, Flat] = BaseFlags(),
) -> None:
    """Print a table, or JSON, of what tasks measure or of who answers better."""
    adapters = named_adapters(adapter or [])
    _check(tasks, comparison, sampling, adapters)
    if comparison.against is not None:
        compare_answers(model, adapters, comparison, system, sampling, loading, as_json=as_json)
    else:
        _tasks(model, adapters, tasks, system, loading, as_json=as_json)


def _check(
    tasks: TaskFlags, comparison: AgainstFlags, sampling: Sampling, adapters: Mapping[str, Path]
) -> None:
    """Raise ConfigError with all flags that do not go together."""
    problems: list[str] = []
    of_tasks = [f"--{name.replace('_', '-')}" for name in _given(tasks)]
    of_comparison = [f"--{name.replace('_', '-')}" for name in _given(comparison)]
    if comparison.against is None:
        if of_comparison:
            problems.append(f"{', '.join(of_comparison)} do nothing without --against")
        if tasks.tasks is None and tasks.tasks_from is None:
            problems.append("name --tasks or --tasks-from, or --against and what it needs")
        if sampling != Sampling():
            problems.append(
                "how tasks generate is in their files; --max-new-tokens and the like do "
                "nothing without --against"
            )
        if tasks.with_base and not adapters:
            problems.append("--with-base does nothing without an --adapter")
    else:
        if of_tasks:
            problems.append(f"{', '.join(of_tasks)} do nothing with --against")
        if len(adapters) != 1:
            problems.append(f"--against compares one --adapter, and {len(adapters)} are given")
        if comparison.prompts is None:
            problems.append("--against needs --prompts FILE")
        if not comparison.judge:
            problems.append("--against needs a --judge, such as exact")
        if comparison.batch_size < 1:
            problems.append(f"--batch-size is {comparison.batch_size}, but must be at least 1")
    if tasks.limit is not None and tasks.limit < 1:
        problems.append(f"--limit is {tasks.limit}, but must be at least 1")
    if tasks.num_fewshot is not None and tasks.num_fewshot < 0:
        problems.append(f"--num-fewshot is {tasks.num_fewshot}, but must be at least 0")
    if problems:
        raise ConfigError(f"Nothing is evaluated: {'; '.join(problems)}.")


def _given(flags: TaskFlags | AgainstFlags) -> list[str]:
    usual = asdict(type(flags)())
    return [name for name, value in asdict(flags).items() if value != usual[name]]


def _tasks(
    model: str | None,
    adapters: Mapping[str, Path],
    flags: TaskFlags,
    system: str | None,
    loading: BaseFlags,
    *,
    as_json: bool,
) -> None:
    from veneer.formats.locate import locate

    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    from veneer.evaluation import tasks as harness
    from veneer.evaluation.harness_model import HarnessModel

    settings = harness.TaskSettings(
        tuple(name for text in flags.tasks or () for name in text.split(",") if name),
        flags.tasks_from,
        flags.num_fewshot,
        flags.limit,
        flags.chat_template,
        system or None,
        flags.allow_code,
    )
    checks = Checks("Nothing is evaluated")
    paths: dict[str, Path] = {}
    for name, directory in adapters.items():
        with checks.check():
            paths[name] = locate(directory).path
    with checks.check():
        harness.check_tasks(settings)
    checks.end()
    model = base_of(model, adapters.values())
    base = load_base(model, loading, adapters)
    sides: dict[str, Path | None] = {BASE: None} if flags.with_base or not paths else {}
    sides |= paths
    results: dict[str, list[Metric]] = {}
    for name, path in sides.items():
        show_doing(f"Evaluating {name}")
        results[name] = harness.evaluate(HarnessModel(base, path), settings)
    if as_json:
        print_json(
            {
                "model": model,
                "adapters": {name: str(path) for name, path in adapters.items()},
                "harness": f"lm_eval {lm_eval.__version__}",
                "settings": _plain(settings),
                "results": {name: [asdict(m) for m in each] for name, each in results.items()},
            }
        )
        return
    _print_metrics(results)


def _print_metrics(results: Mapping[str, Sequence[Metric]]) -> None:
    table = new_table("Task", "Metric", "Rows", *(escape(name) for name in results))
    by_side = [{(m.task, m.name, m.choice): m for m in each} for each in results.values()]
    for key in dict.fromkeys(key for side in by_side for key in side):
        task, name, choice = key
        sides = [side.get(key) for side in by_side]
        first = next(m for m in sides if m is not None)
        arrow = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        label = name if choice == "none" else f"{name}, {choice}"
        numbers = [
            "" if m is None else f"{m.value:.4g}" + (f" ± {m.error:.2g}" if m.error else "")
            for m in sides
        ]
        table.add_row(escape(task), escape(label) + arrow, f"{first.rows:,}", *numbers)
    print_wide(table)


def _plain(settings: TaskSettings) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
