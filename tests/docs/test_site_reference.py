"""What the reference on the site is made of says all that it is asked for."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

import veneer
from veneer.cli.app import app
from veneer.objectives.on_policy import PolicyCriterion
from veneer.objectives.preferences import Judged, Pairs
from veneer.training import metric_names
from veneer.training.events import Evaluated, Step

SITE = Path(__file__).parents[2] / "tools" / "site"
COMMANDS = [name for name in app if not name.startswith("-")]


@pytest.fixture(scope="module")
def commands():
    sys.path.insert(0, str(SITE))
    try:
        import commands

        yield commands
    finally:
        sys.path.remove(str(SITE))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_page_has_each_of_its_flags_with_what_it_does(name, commands):
    page = commands.page(name)
    shown = [
        argument
        for argument in app[name].assemble_argument_collection(parse_docstring=True)
        if argument.show and argument.parse
    ]
    assert shown
    for argument in shown:
        assert f"{{ #{argument.name.strip('-')} }}" in page
        assert argument.parameter.help, f"{name} {argument.name} says nothing"


def test_every_public_name_says_what_it_is():
    silent = [name for name in veneer.__all__ if not (getattr(veneer, name).__doc__ or "").strip()]
    assert silent == []


def test_every_number_of_a_run_has_a_meaning():
    beside = {"metrics", "best"}  # the first are others' numbers; the second is not written
    assert {x.name for x in fields(Step)} - beside == set(metric_names.STEPS)
    assert {x.name for x in fields(Evaluated)} - beside == set(metric_names.EVALUATIONS)
    assert set(Pairs.metrics) == set(metric_names.PAIRS)
    assert set(Judged.metrics) == set(metric_names.JUDGED)
    policy = PolicyCriterion.__dataclass_fields__["metrics"].default
    assert set(policy) <= set(metric_names.SAMPLES)
