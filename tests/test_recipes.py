"""The recipes: their rows, how answers are judged, and that tune takes their settings."""

import re
from pathlib import Path

import pytest
from bench.recipes import HERE, NAMES, command_of, family_of, write

from veneer.cli.app import app


def test_each_recipe_is_on_its_page_and_has_rows():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(\1\.yaml\)", page, re.MULTILINE) == [
        *("assistant", "extraction", "classification", "code"),
        *("language", "persona", "facts", "tools"),
    ]
    modules = {path.stem for path in HERE.glob("*.py")} - {"__init__", "__main__", "family"}
    assert modules == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_is_not_trained_on_and_judged_rightly(name):
    family = family_of(name)
    assert {row.prompt for row in family.train}.isdisjoint(row.prompt for row in family.test)
    assert len({row.prompt for row in family.test}) == len(family.test) >= 28
    answers = [row.completion for row in family.test]
    assert all(map(family.is_right, answers, family.test))
    assert not any(family.is_right(answer, family.test[0]) for answer in ("", "I do not know."))
    assert family.name == name


@pytest.mark.parametrize("name", NAMES)
def test_tune_takes_the_settings(name, tmp_path):
    family_of(name).write(tmp_path)
    command, bound, _ = app.parse_args(
        command_of(name, tmp_path), exit_on_error=False, print_error=False
    )
    assert command.__name__ == "tune"
    assert bound.arguments["lora"].targets == ("all",)
    assert bound.arguments["training"].lr == 1e-3


def test_the_table_keeps_what_is_not_measured_again(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text((HERE / "README.md").read_text().partition("| code |")[0])
    monkeypatch.setattr("bench.recipes.HERE", Path(tmp_path))
    write({"tools": "| tools | 1 | 2 | 0 | 1 (50%) |"})
    write({"code": "| code | 1 | 2 | 0 | 2 (100%) |", "tools": "| tools | 1 | 2 | 0 | 2 (100%) |"})
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[-2:] == ["| code | 1 | 2 | 0 | 2 (100%) |", "| tools | 1 | 2 | 0 | 2 (100%) |"]
