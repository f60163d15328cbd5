"""Bases on the pretend GPU: all of one is there once it is loaded, and adapters start there."""

import pytest

from gpu.loading_cases import CASES, SLOW_CASES

THERE = {
    "devices": ["cuda:0"],
    "quantized": True,
    "reads_ahead": 0,  # of its files, which it needs no more
    "dtype": "torch.bfloat16",
}


@pytest.mark.parametrize("case", CASES)
def test_all_of_a_base_is_on_the_card(pretend, case):
    assert pretend("loading_cases", case) == THERE


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_all_of_every_base_is_on_the_card(pretend, case):
    assert pretend("loading_cases", case, "SLOW_CASES") == THERE
