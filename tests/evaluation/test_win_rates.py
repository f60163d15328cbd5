"""Who answers better, and how sure that is."""

import pytest

from veneer.evaluation.win_rates import WinRate, wilson, win_rate
from veneer.rewards.checkers import Exact
from veneer.rewards.judged import Answered, RewardFault, Weighted


class Refuses:
    name = "refuses"

    def __call__(self, answer: Answered) -> float:
        if answer.text == "odd":
            raise RewardFault("raised", "it is odd")
        return 0.0

    def close(self) -> None:
        """There is nothing to end."""


def test_answers_are_compared_prompt_by_prompt():
    references = ("yes",)
    ours = [Answered(text, references=references) for text in ("yes", "yes", "no", "no", "odd")]
    theirs = [Answered(text, references=references) for text in ("no", "yes", "yes", "no", "yes")]
    rate = win_rate(ours, theirs, [Weighted(Exact()), Weighted(Refuses())])
    assert (rate.wins, rate.ties, rate.losses, rate.unjudged) == (1, 2, 1, 1)
    assert "it is odd" in rate.first_fault


# The bounds solve (p - share)² = z² p (1 - p) / n, which is what Wilson's interval is.
@pytest.mark.parametrize(("count", "of"), [(0, 5), (1, 5), (7, 9), (50, 100), (9, 9)])
def test_bounds_are_wilsons(count, of):
    for bound in wilson(count, of):
        excess = (bound - count / of) ** 2 - 1.959964**2 * bound * (1 - bound) / of
        assert abs(excess) < 1e-12
    low, high = wilson(count, of)
    assert 0 <= low <= count / of <= high <= 1


def test_a_few_prompts_decide_nothing():
    assert WinRate(3, 4, 0).verdict == "undecided"
    assert WinRate(30, 4, 5).verdict == "better"
    assert WinRate(5, 4, 30).verdict == "worse"
