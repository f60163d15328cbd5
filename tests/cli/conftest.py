"""Commands that must succeed or fail, and quick runs of `veneer tune`."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import veneer.cli.tune
from support.tuned_facts import FACTS, write_rows
from veneer.cli.app import run


@pytest.fixture
def shown(capsys) -> Callable[..., str]:
    """Run a command that must succeed, and return what it prints to the output."""

    def run_command(*arguments: object) -> str:
        capsys.readouterr()
        assert run(list(map(str, arguments))) == 0
        return capsys.readouterr().out

    return run_command


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run a command that must fail with one error and no traceback, and return the error."""

    def run_command(*arguments: object) -> str:
        capsys.readouterr()
        assert run(list(map(str, arguments))) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        assert printed.err.count("Error:") == 1
        return " ".join(printed.err.split())

    return run_command


@pytest.fixture
def caught(monkeypatch):
    """Catch what `veneer tune` would run."""
    seen = SimpleNamespace(recipe=None, options=None)

    def catch(recipe, **options):
        seen.recipe, seen.options = recipe, options
        return 0

    monkeypatch.setattr(veneer.cli.tune, "run_recipe", catch)
    return seen


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "facts.jsonl", FACTS)


@pytest.fixture
def tune(minigpt_home, data):
    """Run `veneer tune` on the facts, quickly, and return its exit code."""

    def run_tune(*flags: object) -> int:
        return run(["tune", str(minigpt_home), str(data), *map(str, flags)])

    return run_tune
