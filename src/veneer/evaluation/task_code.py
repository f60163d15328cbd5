"""What the files of tasks may do to this machine: name their data, fill templates, and no more.

The harness itself would run whatever Python a file names, fill templates without a sandbox, and
fetch metrics, which are programs, from the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import evaluate as hub_metrics
import lm_eval.tasks
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api import registry
from lm_eval.api import task as harness_task
from lm_eval.tasks import _yaml_loader

from veneer.errors import ConfigError

HARNESS = Path(lm_eval.tasks.__file__).resolve().parent


@contextmanager
def restricted(*, allow_code: bool) -> Iterator[None]:
    """In this context a task's templates are in jinja2's sandbox, and its metrics are the harness's
    own. With allow_code, the Python that its files name runs; that of the tasks that came with the
    harness runs always.

    Raises ConfigError where a task asks for more.
    """
    with ExitStack() as stack:
        for owner, name, value in (
            (utils, "env", _sandbox()),
            (harness_task, "get_metric", _own_metric),
            (hub_metrics, "load", _refuse_metric),
        ):
            stack.enter_context(patch.object(owner, name, value))
        if not allow_code:
            own = _own_function(_yaml_loader._import_func_in_yml)
            stack.enter_context(patch.object(_yaml_loader, "_import_func_in_yml", own))
        yield


def _sandbox() -> SandboxedEnvironment:
    own = utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update(own.filters)
    return sandbox


def _own_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
    if hf_evaluate_metric or name not in registry.metric_registry:
        _refuse_metric(name)
    return registry.get_metric(name)


def _refuse_metric(path: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        f"A task asks for the metric {path!r}, which the harness does not have itself. Metrics of "
        "the hub are programs, and none is run from there."
    )


def _own_function(load: Callable[[str, Path], Any]) -> Callable[[str, Path], Any]:
    def import_function(qual: str, base_dir: Path) -> Any:
        if not base_dir.resolve().is_relative_to(HARNESS):
            raise ConfigError(
                f"A task in {base_dir} names Python (!function {qual}), which does not run unless "
                "you allow it: --allow-code, for tasks that you would run as a program."
            )
        return load(qual, base_dir)

    return import_function
