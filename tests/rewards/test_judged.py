"""Answers are judged by all rewards, and a reward that fails is named, counted and passed over."""

from __future__ import annotations

import math

import pytest

from veneer.errors import ConfigError, TrainingError
from veneer.rewards.checkers import Exact, Matches, ValidJSON
from veneer.rewards.judged import Answered, Judged, RewardFault, Weighted, judge
from veneer.rewards.named import reward_named, rewards_named
from veneer.rewards.programs import PassesTests, program_of


class Scripted:
    """A reward that gives what a list says, by the answer's text."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def __call__(self, answer):
        value = self.values[int(answer.text)]
        if isinstance(value, RewardFault):
            raise value
        return value

    def close(self):
        pass


ANSWERS = [Answered(str(i), place=f"rows.jsonl:{i + 1}") for i in range(3)]


def test_the_reward_is_the_weighted_sum():
    both = [
        Weighted(Scripted("a", [1.0, 0.0, 2.0]), 0.5),
        Weighted(Scripted("b", [3.0, 1.0, -1.0])),
    ]
    judged = judge(ANSWERS, both)
    assert judged.rewards == [3.5, 1.0, 0.0]
    assert judged.by_name == {"a": [1.0, 0.0, 2.0], "b": [3.0, 1.0, -1.0]}
    assert judged.faults == {}
    assert judged.first_fault == ""


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RewardFault("raised", "ZeroDivisionError: division by zero."), "raised"),
        (RewardFault("timed out", "no reward came within 1 s."), "timed out"),
        (math.nan, "not a finite number"),
        (math.inf, "not a finite number"),
    ],
)
def test_a_reward_that_fails_is_named_and_counted(fault, kind):
    rewards = [
        Weighted(Scripted("good", [1.0] * 3)),
        Weighted(Scripted("bad", [1.0, fault, fault])),
    ]
    judged: Judged = judge(ANSWERS, rewards)
    assert judged.rewards[0] == 2.0
    assert all(map(math.isnan, judged.rewards[1:]))
    assert judged.by_name["good"] == [1.0] * 3
    assert judged.faults == {f"bad {kind}": 2}
    assert f"The reward bad {kind} for an answer to rows.jsonl:2" in judged.first_fault
    with pytest.raises(TrainingError, match=f"The reward bad {kind} for an answer to rows.jsonl:2"):
        judge(ANSWERS, rewards, on_fault="stop")


def test_an_exact_answer_is_a_reference():
    exact = Exact()
    assert exact(Answered(" 12\n", references=["13", "12"])) == 1
    assert exact(Answered("12.", references=["12"])) == 0


def test_a_pattern_may_have_a_group_that_is_a_reference():
    anywhere = Matches(r"sum is \d+")
    assert anywhere(Answered("The sum is 7")) == 1
    assert anywhere(Answered("seven")) == 0
    right = Matches(r"= (?<answer>\d+)$")
    assert right(Answered("3 + 4 = 7", references=["7"])) == 1
    assert right(Answered("3 + 4 = 8", references=["7"])) == 0
    with pytest.raises(ConfigError, match="no regular expression") as refused:
        Matches("(" * 5000)
    assert len(str(refused.value)) < 400
    with pytest.raises(ConfigError, match="no regular expression"):
        Matches("(")


def test_a_pattern_that_takes_too_long_is_ended():
    slow = Matches(r"^(a|aa)+$", seconds=0.01)
    with pytest.raises(RewardFault, match=r"more than 0\.01 s") as caught:
        slow(Answered("a" * 60 + "b"))
    assert caught.value.kind == "timed out"


def test_json_is_judged_by_a_schema(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["sum"]}')
    valid = ValidJSON(schema)
    assert valid(Answered('{"sum": 7}')) == 1
    assert valid(Answered('{"total": 7}')) == 0
    assert valid(Answered("[" * 100_000)) == 0
    assert valid(Answered('"\\ud800"')) == 0  # half a character
    assert valid(Answered('{"sum": NaN}')) == 0
    assert valid(Answered("The sum is 7")) == 0
    for text in ('{"type": 7}', '{"not": ' * 5000):
        schema.write_text(text)
        with pytest.raises(ConfigError, match="no JSON schema"):
            ValidJSON(schema)


def test_a_program_is_the_last_fenced_block():
    assert program_of("Look:\n```python\nx = 1\n```\nor\n```\nx = 2\n```\n") == "x = 2\n"
    assert program_of("x = 3") == "x = 3"


def test_a_program_gets_the_share_of_tests_that_it_passes():
    answer = "```python\ndef double(x):\n    return 2 * x\n```"
    tests = ["assert double(2) == 4", "assert double(2) == 5"]
    assert PassesTests(seconds=60)(Answered(answer, references=tests)) == 0.5
    with pytest.raises(RewardFault, match="no tests"):
        PassesTests()(Answered(answer))


@pytest.mark.slow
def test_a_program_cannot_take_more_than_its_time_and_memory():
    limited = PassesTests(seconds=2, memory=2**28)
    endless, greedy = "while True: pass", "x = bytearray(2**30)"
    assert limited(Answered(endless, references=["assert True"])) == 0
    assert limited(Answered(greedy, references=["assert True"])) == 0


def test_a_program_that_ends_itself_passes_no_test():
    answer = "def double(x):\n    raise SystemExit(0)"
    assert PassesTests(seconds=60)(Answered(answer, references=["assert double(2) == 4"])) == 0


def test_rewards_have_names():
    assert isinstance(reward_named("exact", seconds=1), Exact)
    assert isinstance(reward_named("tests", seconds=1), PassesTests)
    assert reward_named("regex:a:b", seconds=1).pattern == "a:b"
    with pytest.raises(ConfigError, match="'magic' names no reward"):
        reward_named("magic", seconds=1)
    with (
        pytest.raises(ConfigError, match=r"(?s)2 reasons.*'a' names no.*'b' names no"),
        rewards_named(["a", "b"], [1, 1], [1, 1]),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="Two rewards are called exact"),
        rewards_named(["exact", "exact"], [1, 1], [1, 1]),
    ):
        pass
