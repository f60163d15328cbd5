"""What commands read under faults, and a table of the faults that were made to happen."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from support import faulty_commands
from support.faults import POINTS


def pytest_collection_modifyitems(items):
    if sys.platform == "linux" and shutil.which("cc"):
        return
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="faults need Linux and a compiler of C"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    faulty_commands.write_inputs(home)
    return home


def pytest_terminal_summary(terminalreporter):
    """Show how many calls of each kind were hit, and how many violations there were."""
    rows: dict[str, Counter] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue  # setting up and tearing down report the same again
            for name, value in report.user_properties:
                if name == POINTS:
                    rows.setdefault(value["command"], Counter()).update(value["points"])
    if rows:
        kinds = sorted(set().union(*rows.values()))
        terminalreporter.write_line(f"\n{'':24}" + "".join(f"{kind:>12}" for kind in kinds))
        for command, points in rows.items():
            counts = "".join(f"{points[kind]:>12,}" for kind in kinds)
            terminalreporter.write_line(f"{command:24}{counts}")
