"""What is compared, as data: labels, budgets, and every problem of the settings at once."""

import pytest

from support.comparison_jobs import job
from veneer.adapter.config import LoRA
from veneer.compare.budget import parse_budget
from veneer.compare.config import CompareConfig
from veneer.compare.job import Job
from veneer.compare.labels import LABELS, swept
from veneer.errors import ConfigError


@pytest.mark.parametrize("name", LABELS)
def test_every_label_makes_a_recipe_that_can_be(name):
    from veneer.compare.measure import recipe_of

    label = LABELS[name]
    recipe = recipe_of(job(label=label))
    assert recipe.training.lr == 1e-3
    assert recipe.what_trains == label.what_trains
    assert recipe.training.steps == 3
    assert label.explained.endswith(".")


def test_a_job_is_read_back_as_it_was_written(tmp_path):
    for label in LABELS.values():
        written = job(label=label, seed=4, files={"data": "aa", "test": "bb"})
        written.write(tmp_path / "job.json")
        assert Job.read(tmp_path / "job.json").settings() == written.settings()


@pytest.mark.parametrize(
    ("text", "steps", "shown"),
    [
        ("steps:200", 200, "200 steps"),
        ("tokens:100000", 200, "100,000 tokens"),
        ("tokens:1", 1, "1 token"),
        ("minutes:0.5", 15, "0.5 minutes"),
        ("minutes:1", 30, "1 minute"),
    ],
)
def test_a_budget_is_so_many_steps(text, steps, shown):
    budget = parse_budget(text)
    assert budget.steps(tokens_a_step=500, seconds_a_step=2.0) == steps
    assert str(budget) == shown


@pytest.mark.parametrize(
    "text",
    ["200", "steps", "steps:", "steps:0", "steps:1.5", "tokens:-3", "hours:1", "minutes:inf"],
)
def test_a_budget_that_cannot_be_is_named(text):
    with pytest.raises(ConfigError, match="steps:N, tokens:N or minutes:N"):
        parse_budget(text)


def test_problems_are_named_all_at_once():
    with pytest.raises(ConfigError) as caught:
        CompareConfig(
            methods="lora,loar",
            ranks="1,x",
            budget="steps:none",
            seeds=0,
            eval_rows=0,
            lr={"fulll": 1e-3, "lora": -1.0},
            test_rows=3,
        )
    message = str(caught.value)
    for problem in (
        "'loar' is unknown; did you mean 'lora'?",
        "ranks is 1, x",
        "budget is 'steps:none'",
        "seeds is 0",
        "eval_rows is 0",
        "'fulll', which is unknown; did you mean 'full'?",
        "lr of lora is -1.0",
        "test_rows would do nothing without test",
    ):
        assert problem in message


def test_what_is_swept_keeps_its_scaling_and_shares_runs_with_lora():
    labels = swept([1, 8, 64], ["qv", "all"])
    assert [label.name for label in labels] == [
        "rank 1, all",
        "rank 8, all",
        "rank 64, all",
        "rank 8, qv",
    ]
    assert {LoRA(**label.lora).scaling_of("x") for label in labels} == {2.0}
    assert [label.run for label in labels] == ["rank 1, all", "lora", "rank 64, all", "rank 8, qv"]
    config = CompareConfig(ranks="8", lr={"lora": 0.5})
    assert config.rate_of(config.swept[0], 576) == config.rate_of(LABELS["lora"], 576) == 0.5
    rates = {name: config.rate_of(LABELS[name], 576) for name in ("dora", "qlora", "lora+")}
    assert rates == {"dora": 1.3e-3, "qlora": 1.3e-3, "lora+": 3.3e-4}
