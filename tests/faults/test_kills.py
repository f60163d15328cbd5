"""A training that is killed at any system call goes on with --resume, to the bit."""

import random

import pytest

from support.faults import NONE, Case, Fault
from support.faulty_commands import commands


def survive(case: Case, kills: int, seed: int) -> int:
    """Kill a training `kills` times at random calls, going on after each, and begin anew where it
    has come to its end; return how often it did. All ends must be the undisturbed run's."""
    draws, ends = random.Random(seed), 0
    calls = case.undisturbed.counts["any"]
    while kills:
        outcome = case.run(Fault("any", draws.choice(("kill", "torn")), draws.randint(1, calls)))
        while kills and outcome.code < 0:
            kills -= 1
            fault = Fault("any", draws.choice(("kill", "torn")), draws.randint(1, calls))
            outcome = case.again(fault if kills else NONE)
        assert outcome.code == 0, outcome.errors
        assert case.is_done(), f"another result, with {kills} kills left: {case.other_files()}"
        ends += 1
    return ends


@pytest.mark.slow
def test_two_hundred_kills(inputs, tmp_path):
    case = Case(commands(inputs)["tune"], tmp_path)
    ends = survive(case, 200, seed=0)
    assert 0 < ends < 200
