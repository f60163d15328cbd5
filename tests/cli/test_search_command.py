"""`veneer search`: what it asks for, what it shows, and the picture of its trials."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import yaml

import veneer
import veneer.cli.many
import veneer.cli.trials
from veneer.cli.app import run
from veneer.cli.response import axes_of, draw_response
from veneer.training.events import Notice
from veneer.training.search import auto
from veneer.training.search.result import (
    Cost,
    SearchBegun,
    Searched,
    SearchResult,
    TrialEnded,
    TrialResult,
    markdown,
)

TRIALS = [
    TrialResult(0, {"rank": 4, "lr": 3e-4, "targets": "all"}, "complete", {100: 1.5}, 9, 90, 9),
    TrialResult(2, {"rank": 16, "lr": 1e-3, "targets": "all"}, "complete", {100: 1.75}, 9, 90, 9),
    TrialResult(1, {"rank": 4, "lr": 2e-3, "targets": "qv"}, "pruned", {12: 3.0}, 2, 20, 9),
]
RESULT = SearchResult("base", "rows.jsonl", TRIALS, Cost(10.0, 200, 270, 20.0))


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What the command asks of `veneer.search`, which then ends with RESULT."""
    seen: dict = {}

    def search(recipe, over, config, **options):
        seen.update(recipe=recipe, over=over, config=config, options=options)
        yield "", SearchBegun(4, 2)
        yield "001", TrialEnded(TRIALS[2], "its loss was not finite")
        yield "", Searched(seen.get("result", RESULT))

    monkeypatch.setattr(veneer, "search", search)
    return seen


def test_the_settings_of_a_search_and_of_its_trials(asked, tmp_path, capsys):
    flags = ["--over", "lr=1e-4..3e-3", "--over", "rank=4,8", "--trials", "9", "--pruner", "none"]
    course = ["--alpha", "16", "--epochs", "2", "--dtype", "bf16", "--out", str(tmp_path)]
    course += ["--objective", "dpo", "--beta", "0.2"]
    assert run(["search", "owner/base", "rows.jsonl", *flags, *course, "--together", "3"]) == 0
    assert asked["over"] == {"lr": "1e-4..3e-3", "rank": "4,8"}
    config = asked["config"]
    assert (config.trials, config.together, config.pruner, config.minutes) == (9, 3, "none", None)
    settings = asked["recipe"].settings()
    assert (settings["alpha"], settings["epochs"], settings["dtype"]) == (16, 2, "bf16")
    assert (settings["objective"], settings["beta"]) == ("dpo", 0.2)
    printed = capsys.readouterr()
    shown = " ".join(printed.out.split())
    assert "trial 1: its loss was not finite" in printed.err
    assert "0 4 0.0003 all 1.5000 9/9 complete" in shown
    assert "pruned at 12 % (3 of 4)" in shown
    assert "1 4 0.002 qv 3.0000 2/9 pruned at 12 %" in shown
    assert "200 tokens in 10 s. To their ends one after another" in shown
    assert "in about 14 s at the 20 tokens/s" in shown
    assert "Best rank 4, lr 0.0003, targets all" in shown
    assert (tmp_path / "response.png").stat().st_size > 0


def test_a_search_of_which_no_trial_came_to_its_end_says_so(asked, tmp_path, capsys):
    asked["result"] = SearchResult("base", "rows.jsonl", TRIALS[2:], RESULT.cost)
    arguments = ["search", "owner/base", "rows.jsonl", "--over", "lr=1..2", "--out", str(tmp_path)]
    assert run(arguments) == 2
    assert "No trial came to its end" in capsys.readouterr().err


def test_what_over_cannot_say(refused):
    error = refused("search", "owner/base", "rows.jsonl", "--over", "lr", "--over", "rank=4")
    assert "--over cannot be followed: 'lr' must be SETTING=A..B or SETTING=A,B,C" in error
    error = refused("search", "owner/base", "rows.jsonl", "--trials", "0", "--minutes", "-1")
    assert "trials is 0, but must be a whole number of at least 1" in error
    assert "minutes is -1.0, but must be a number above 0" in error


def test_the_picture_has_the_rate_along_the_axis_and_a_series_for_each_rank(tmp_path):
    assert axes_of(TRIALS) == ("lr", "rank", "targets")
    assert axes_of([TrialResult(0, {"rank": 4}, "complete", {100: 1.0})]) == ("rank", None, None)
    no_losses = SearchResult("base", "rows", [TrialResult(0, {"lr": 1.0}, "failed")], RESULT.cost)
    with pytest.raises(veneer.VeneerError, match="no trial was measured"):
        draw_response(no_losses, Path(tmp_path / "response.png"))


def test_patterns_are_no_formulas_in_the_picture_and_no_cells_of_the_table(tmp_path):
    patterns = [r"re:.*(q|k)_proj$|.*\.v_proj$", "re:^x$|$^"]
    trials = [
        TrialResult(
            n, {"lr": 1e-3 * (n + 1), "targets": pattern, "init": pattern}, "complete", {9: n}
        )
        for n, pattern in enumerate(patterns)
    ]
    result = replace(RESULT, trials=trials)
    draw_response(result, tmp_path / "response.png")
    rows = markdown(result).splitlines()[-2:]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [8, 8]


def test_trials_have_the_settings_of_a_recipe(asked, tmp_path, refused):
    lora, training = veneer.LoRA(rank=3, targets="mlp"), veneer.TrainConfig(steps=7, lr=2e-3)
    recipe = veneer.Recipe("owner/base", "rows.jsonl", lora=lora, training=training)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.settings() | {"out": "runs/a"}))
    assert run(["search", "--config", str(path), "--over", "lr=1e-4,1e-3", "--steps", "9"]) == 0
    assert (asked["recipe"].model, str(asked["recipe"].data)) == ("owner/base", "rows.jsonl")
    assert (asked["recipe"].lora.rank, asked["recipe"].training.steps) == (3, 9)
    assert asked["recipe"].out == Path("dist/search")
    path.write_text(yaml.safe_dump(recipe.settings() | {"shard": "base", "updates": 2}))
    error = refused("search", "--config", str(path), "--over", "rank=1,2")
    assert "Trials cannot have what" in error
    assert "shard, updates" in error


def test_auto_is_settled_before_the_run_and_all_else_is_the_commands(caught, monkeypatch, refused):
    seen = {}

    def before(recipe, names, **options):
        seen.update(names=names, options=options)
        return replace(recipe, training=replace(recipe.training, lr=0.5))

    monkeypatch.setattr(veneer.cli.trials, "search_before", before)
    line = ["tune", "owner/base", "rows.jsonl", "--lr", "auto", "--rank", "auto"]
    assert run([*line, "--epochs", "3", "--ignore-plan"]) == 0
    assert seen["names"] == ("lr", "rank")
    assert seen["options"]["ignore_plan"]
    assert (caught.recipe.training.lr, caught.recipe.training.epochs) == (0.5, 3)
    assert run(["tune", "owner/base", "rows.jsonl", "--lr", "1e-3"]) == 0
    assert caught.recipe.training.lr == 1e-3
    monkeypatch.setattr(veneer.cli.trials, "search_before", lambda *_, **__: 130)
    assert run(line) == 130
    assert "auto searches in one process" in refused(*line, "--processes", "2")


JOBS = """\
jobs:
  - {name: a, lr: auto, rank: auto}
  - {name: b, rank: auto}
  - {name: c, lr: 2e-3}
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"a": ("lr", "rank"), "b": ("rank",)}),
        (["--lr", "auto"], {"a": ("lr", "rank"), "b": ("lr", "rank")}),
    ],
)
def test_what_jobs_leave_to_a_search_is_settled_before_all_of_them(
    flags, expected, monkeypatch, tmp_path
):
    seen, trained = {}, {}

    def before(recipe, names, **options):
        seen[options["job"]] = names
        assert recipe.out.name == options["job"]
        return replace(recipe, training=replace(recipe.training, lr=0.5))

    def tune_many(recipes, **options):
        trained.update(recipes)
        yield from ()

    monkeypatch.setattr(veneer.cli.many, "search_before", before)
    monkeypatch.setattr(veneer, "tune_many", tune_many)
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(JOBS)
    line = ["tune", "owner/base", "rows.jsonl", "--jobs", str(jobs), "--quiet", *flags]
    assert run([*line, "--out", str(tmp_path / "runs")]) == 0
    assert seen == expected
    assert {name: recipe.training.lr for name, recipe in trained.items()} == {
        "a": 0.5,
        "b": 0.5,
        "c": 2e-3,
    }


def test_the_search_before_a_run_takes_all_flags_of_the_run(caught, monkeypatch):
    taken = signature(auto.settle_by_search)

    def settled(*given, **options):
        taken.bind(*given, **options)
        yield "", Notice("searched")
        return given[0]

    monkeypatch.setattr(auto, "settle_by_search", settled)
    flags = "--grace-seconds 9 --track mlflow --resume --force --ignore-plan --quiet --json"
    assert run(["tune", "owner/base", "rows.jsonl", "--lr", "auto", *flags.split()]) == 0
    assert (caught.options["grace_seconds"], caught.options["track"]) == (9.0, ("mlflow",))


def test_a_search_before_a_job_says_whose_it_is(monkeypatch, capsys):
    def settled(recipe, names, **options):
        yield "001", Notice("searched")
        return recipe

    monkeypatch.setattr(auto, "settle_by_search", settled)
    recipe, shows = veneer.Recipe("owner/base", "rows.jsonl"), {"quiet": False, "as_json": True}
    before = veneer.cli.trials.search_before
    assert before(recipe, ("lr", "rank"), track=(), job="small", **shows) is recipe
    printed = capsys.readouterr()
    event = json.loads(printed.out)
    assert (event["job"], event["trial"], event["text"]) == ("small", "001", "searched")
    assert "small: lr, rank" in printed.err
