"""The results of the cases that ran on the pretend GPU, one process for all fast ones."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from support import pretend_gpu

HERE = Path(__file__).parent
MODULES = sorted(f"gpu.{path.stem}" for path in HERE.glob("*_cases.py"))


@pytest.fixture(scope="session")
def pretend(tmp_path_factory) -> Callable[..., Any]:
    """Return a function of a module of cases, a case of it, the table that has it, and the device.

    It returns what the case returned, fails with the case's own traceback, and skips where there
    can be no pretend GPU. Processes of one run of the tests share the results.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    read: dict[Path, Mapping[str, Any]] = {}

    def result(module: str, case: str, table: str = "CASES", device: str = "cuda") -> Any:
        name = f"gpu.{module}"
        modules = MODULES if table == "CASES" else [name]
        place = root / f"pretend-{'all' if table == 'CASES' else module}-{table}-{device}.json"
        if place not in read:
            with FileLock(place.with_suffix(".lock")):
                if not place.exists():
                    try:
                        outcomes: Any = pretend_gpu.run(modules, table, device)
                    except pretend_gpu.NoPretendGPU as reason:
                        outcomes = str(reason)
                    place.write_text(json.dumps(outcomes))
            read[place] = json.loads(place.read_text())
        outcomes = read[place]
        if isinstance(outcomes, str):
            pytest.skip(f"there can be no pretend GPU: {outcomes}")
        outcome = outcomes[name].get(case) or outcomes[name][""]
        if "error" in outcome:
            pytest.fail(outcome["error"], pytrace=False)
        return outcome["result"]

    return result
