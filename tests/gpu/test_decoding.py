"""Law 13 for what answers: a step on a card asks it for no value."""

import pytest

from gpu.decoding_cases import CASES, SLOW_CASES


def cases(kind: str) -> list:
    slow = [pytest.param(case, "SLOW_CASES", marks=pytest.mark.slow) for case in SLOW_CASES]
    both = [*(pytest.param(case, "CASES") for case in CASES), *slow]
    return [case for case in both if case.values[0].startswith(kind)]


@pytest.mark.parametrize(("case", "table"), cases("prefill"))
def test_a_prompt_is_read_without_waiting(case, table, pretend):
    assert pretend("decoding_cases", case, table) == {"waits": [], "fits": True}


@pytest.mark.parametrize(("case", "table"), cases("decoding"))
def test_a_step_waits_for_nothing(case, table, pretend):
    """Rows with adapters of their own, and a prompt beside them; tokens are read later."""
    expected = {"waits": [], "reading": [], "fits": True, "tokens": [4] * 3, "tops": [2] * 3}
    assert pretend("decoding_cases", case, table) == expected


def test_what_waits_again_is_noticed(pretend):
    waits = pretend("decoding_cases", "waiting again")
    assert len(waits["sending"]) == 1
    assert waits["reading"]


@pytest.mark.parametrize(("case", "table"), cases("merging"))
def test_merging_and_switching_wait_for_nothing(case, table, pretend):
    expected = {"waits": [], "fits": True, "dtypes": ["torch.bfloat16"]}
    assert pretend("decoding_cases", case, table) == expected


@pytest.mark.parametrize(("case", "table"), cases("generating"))
def test_answers_wait_for_nothing_but_their_tokens(case, table, pretend):
    assert pretend("decoding_cases", case, table) == {"waits": [], "pieces": [[1] * 3] * 3}


@pytest.mark.parametrize(("case", "table"), cases("engine"))
def test_the_engine_waits_for_nothing_in_its_steps(case, table, pretend):
    result = pretend("decoding_cases", case, table)
    assert result["waits"] == result["errors"] == []
    assert (result["tokens"], result["scores"], result["tops"]) == ([3, 3, 0], 20, [0, 2])
