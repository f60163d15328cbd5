"""A search: trials that train together, make way for others, and leave the best one's run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
import torch

import veneer
from support.many_runs import one_by_one
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model
from veneer.objectives.policy_config import OnPolicy
from veneer.run_directory import RunDirectory
from veneer.run_lock import RunLock
from veneer.training import run
from veneer.training.events import (
    Checkpointed,
    Evaluated,
    Event,
    ModelReady,
    Notice,
    Planned,
    Started,
    Step,
)
from veneer.training.many import train as many
from veneer.training.many import tune as many_runs
from veneer.training.many.planned import DoesNotFit
from veneer.training.search import run as search_run
from veneer.training.search import study
from veneer.training.search.directory import clear
from veneer.training.search.result import (
    Cost,
    SearchBegun,
    TrialBegun,
    TrialEnded,
    markdown,
)
from veneer.training.search.run import _Trials

ROWS = [
    {"prompt": "veneer is thin"[: 3 + i], "completion": "walnut lacquer"[: 4 + i]} for i in range(8)
]
# The second value ruins the model at once, so that a trial of it must make way.
OVER: dict[str, Any] = {"lr": [0.02, 1e4], "rank": "1..4"}
CONFIG = veneer.SearchConfig(trials=6, together=3)


def recipe(home: Path, out: str, **options: Any) -> veneer.Recipe:
    return veneer.Recipe(
        str(home / "base"),
        home / "rows.jsonl",
        lora=veneer.LoRA(rank=2),
        training=veneer.TrainConfig(steps=9, lr=0.02, tokens_per_step=30, clip=0),
        rows=veneer.DataConfig(eval_rows=2),
        device="cpu",
        dtype="float32",
        out=home / out,
        **options,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("search")
    write_model(tiny("llama"), tokenizer(), place / "base")
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return place


@pytest.fixture(scope="module")
def searched(home) -> SimpleNamespace:
    """A search that is stopped at the first end of a trial, dies at the next, and goes on."""
    own, events = recipe(home, "out"), list[tuple[str, Event]]()

    def has_ended() -> bool:
        return any(isinstance(event, TrialEnded) for _, event in events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LEAST", 1)  # so that trials of nine steps are judged
        patch.setattr(many, "backward_together", one_by_one)
        measured = Mock(side_effect=run.measure)
        patch.setattr(run, "measure", measured)
        for each in veneer.search(own, OVER, CONFIG, should_stop=has_ended):
            events.append(each)
        stopped, measurements = events[-1][1].result, measured.call_count
        died = [len(events)]
        second = veneer.search(own, OVER, CONFIG, resume=True)
        for each in second:
            events.append(each)
            if isinstance(each[1], TrialEnded):
                second.close()
        died.append(len(events))
        events += veneer.search(own, OVER, CONFIG, resume=True)
    ended = [event.trial for _, event in events if isinstance(event, TrialEnded)]
    result = events[-1][1].result
    return SimpleNamespace(
        recipe=own,
        events=events,
        died=died,
        ended=ended,
        result=result,
        stopped=stopped,
        measurements=measurements,
    )


def test_places_of_trials_that_do_badly_go_to_others(searched):
    training: set[str] = set()
    alone = 0  # steps before a second trial begins
    for number, (name, event) in enumerate(searched.events):
        if number in searched.died:
            training.clear()
        if isinstance(event, SearchBegun):
            before = [each for _, each in searched.events[:number]]
            ended = sum(isinstance(each, TrialEnded) for each in before)
            assert event == SearchBegun(CONFIG.trials, ended)
        elif isinstance(event, TrialBegun):
            training.add(name)
        elif isinstance(event, TrialEnded):
            training.remove(name)
        elif isinstance(event, Step) and number < searched.died[0]:
            alone += {*training} == {"000"}
        assert len(training) <= CONFIG.together
    assert alone >= 3
    assert sorted(trial.number for trial in searched.ended) == [*range(CONFIG.trials)]
    ruined = [trial for trial in searched.ended if trial.values["lr"] == 1e4]
    assert ruined
    assert {trial.state for trial in ruined} == {"pruned"}
    assert all(trial.steps < 9 for trial in ruined)
    assert searched.ended[0].values["lr"] == 0.02 or searched.ended[0].state == "pruned"


def test_the_best_trial_is_left_as_the_run_that_it_is_alone(searched, home):
    best, out = searched.result.best, RunDirectory(searched.recipe.out)
    assert best.state == "complete"
    assert best.loss == min(t.loss for t in searched.ended if t.state == "complete")
    settings = out.read_recipe()
    assert {name: settings[name] for name in best.values} == best.values
    lora = replace(searched.recipe.lora, rank=best.values["rank"], alpha=None)
    course = replace(searched.recipe.training, lr=best.values["lr"], eval_every=1)
    alone = replace(searched.recipe, lora=lora, training=course, out=home / "alone")
    list(veneer.tune(alone))
    ours, theirs = (
        torch.load(place / "lora_adapter" / "lora_weights.pt", weights_only=True)
        for place in (out.path, home / "alone")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [line["eval_loss"] for line in out.read_metrics() if "eval_loss" in line]
    assert min(losses[1:]) == best.loss
    assert out.read_progress()["ended"] == "finished"
    left = {path.name for path in (out.path / "trials").rglob("*") if path.is_dir()}
    assert left == {trial.name for trial in searched.ended}


def test_trials_are_measured_where_they_are_judged_and_their_start_once_for_all(searched):
    for trial in searched.ended:
        steps = (1, 3, 5, 6, 9)  # an epoch ends after the fifth
        judged = [round(100 * step / 9) for step in steps if step <= trial.steps]
        assert {*trial.losses} <= {*judged}
        assert trial.state != "complete" or [*trial.losses] == judged
    first = [event for _, event in searched.events[: searched.died[0]]]
    evaluated = [event for event in first if isinstance(event, Evaluated)]
    at_start = [event.eval_loss for event in evaluated if event.step == 0]
    assert len(at_start) > 2
    assert len({*at_start}) == 1
    assert searched.measurements == len(evaluated) - len(at_start) + 1


def test_only_trials_that_have_come_far_or_are_to_go_on_write_checkpoints(searched):
    stopped = {trial.name for trial in searched.stopped.trials if trial.state == "running"}
    early = [
        (number, name)
        for number, (name, event) in enumerate(searched.events)
        if isinstance(event, Checkpointed) and event.step < 3
    ]
    assert {name for _, name in early} <= stopped
    assert all(number < searched.died[0] for number, _ in early)
    assert any(isinstance(event, Checkpointed) for _, event in searched.events)


def test_a_search_that_is_stopped_says_how_far_each_trial_is(searched):
    running = [trial for trial in searched.stopped.trials if trial.state == "running"]
    assert running
    for trial in running:
        own = [
            event
            for name, event in searched.events[: searched.died[0]]
            if name == trial.name and isinstance(event, Step)
        ]
        assert (trial.steps, trial.tokens) == (len(own), sum(step.tokens for step in own))
        assert trial.all_steps == 9


def test_optuna_opens_the_study(searched):
    study = optuna.load_study(
        study_name="veneer", storage=f"sqlite:///{searched.recipe.out / 'study.db'}"
    )
    assert len(study.trials) == CONFIG.trials
    assert study.best_value == searched.result.best.loss
    assert study.best_params == searched.result.best.values


def test_the_cost_is_that_of_all_steps_and_the_table_has_every_trial(searched):
    cost = searched.result.cost
    own = [event for _, event in searched.events[: searched.died[0]] if isinstance(event, Step)]
    assert cost.tokens == sum(trial.tokens for trial in searched.ended)
    assert cost.tokens < cost.all_tokens
    assert cost.alone == pytest.approx(
        sum(step.tokens for step in own[1:3]) / sum(step.seconds for step in own[1:3])
    )
    table = (searched.recipe.out / "search.md").read_text()
    assert table == markdown(searched.result)
    assert table.count("\n| ") == CONFIG.trials + 1
    numbers = json.loads((searched.recipe.out / "search.json").read_text())
    assert numbers["best"] == searched.result.best.number
    assert len(numbers["trials"]) == CONFIG.trials


def test_a_search_is_another_one_with_other_settings(searched):
    with pytest.raises(veneer.ConfigError, match="holds an earlier search"):
        next(veneer.search(searched.recipe, OVER, CONFIG))
    other = replace(searched.recipe, lora=veneer.LoRA(rank=2, dora=True))
    with pytest.raises(veneer.ConfigError, match=r"another one .* dora \(None there, True here\)"):
        list(veneer.search(other, OVER, CONFIG, resume=True))
    with pytest.raises(veneer.ConfigError, match="over"):
        list(veneer.search(searched.recipe, {"lr": [0.02, 2.0]}, CONFIG, resume=True))
    more = [*veneer.search(searched.recipe, OVER, CONFIG, resume=True)]
    assert more[-1][1].result.best == searched.result.best


def test_what_cannot_be_searched_is_refused_before_anything_trains(home):
    no_rows = replace(recipe(home, "none"), rows=veneer.DataConfig(eval_rows=0))
    with pytest.raises(veneer.ConfigError, match="rows that none of them learns"):
        list(veneer.search(no_rows, OVER, CONFIG))
    over = {"targets": ["attention", "q_prj", "atention"]}
    with pytest.raises(veneer.ConfigError, match=r"q_prj.*\n.*atention"):
        list(veneer.search(recipe(home, "none"), over, CONFIG))
    with pytest.raises(veneer.ConfigError, match=r"no search in .* to go on with"):
        list(veneer.search(recipe(home, "none"), OVER, CONFIG, resume=True))
    full = veneer.Recipe("base", Path("rows"), method=veneer.Method("full"))
    with pytest.raises(veneer.ConfigError, match="full is none"):
        list(veneer.search(full, OVER, CONFIG))
    rewards = OnPolicy(reward=("exact",))
    samples = replace(no_rows, objective=veneer.Objective("grpo"), on_policy=rewards)
    with pytest.raises(veneer.ConfigError, match="grpo learns from samples"):
        list(veneer.search(samples, OVER, CONFIG))
    words = replace(no_rows, rows=veneer.DataConfig(new_words="auto"))
    with pytest.raises(veneer.ConfigError, match="new_words extends the base's vocabulary"):
        list(veneer.search(words, OVER, CONFIG))
    assert not (home / "none").exists()


def test_what_is_in_a_directory_stays_unless_it_may_go(home):
    other = recipe(home, "taken")
    checkpoint = other.out / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (other.out / "metrics.jsonl").write_text("{}")
    for name in ("007", "notes"):
        (other.out / "trials" / name).mkdir(parents=True)
    with pytest.raises(
        veneer.ConfigError, match=r"earlier run \(checkpoints, metrics\.jsonl, 007\)"
    ):
        list(veneer.search(other, OVER, CONFIG))
    lock = RunLock(other.out)
    lock.take()
    with pytest.raises(veneer.ConfigError, match="is being written by another run"):
        list(veneer.search(other, OVER, CONFIG, force=True))
    assert checkpoint.exists()
    lock.release()
    clear(other.out)
    left = {str(path.relative_to(other.out)) for path in other.out.rglob("*")}
    assert left == {"checkpoints", "trials", "trials/notes"}
    no_directory = replace(other, out=home / "rows.jsonl")
    with pytest.raises(veneer.ConfigError, match=r"rows\.jsonl is a file, but --out must name"):
        list(veneer.search(no_directory, OVER, CONFIG))


def test_each_of_few_combinations_is_tried_once_and_no_more_at_a_time_than_fit(home, monkeypatch):
    planned, own = list[int](), many_runs.plan_together

    def plan(jobs: Any, tokens: int) -> Any:
        planned.append(len(jobs))
        return own(jobs, tokens)

    def fits(*_: Any) -> None:
        if planned[-1] > 2:
            raise DoesNotFit("no room")

    monkeypatch.setattr(many, "backward_together", one_by_one)
    monkeypatch.setattr(many_runs, "plan_together", plan)
    monkeypatch.setattr(many_runs, "check_fits_together", fits)
    config = veneer.SearchConfig(trials=9, together=4, pruner="none")
    events = [*veneer.search(recipe(home, "few"), {"rank": "1..4"}, config)]
    trials = events[-1][1].result.trials
    by_number = sorted(trials, key=lambda trial: trial.number)
    assert [trial.values["rank"] for trial in by_number] == [2, 1, 3, 4]  # its own is the first
    assert {trial.state for trial in trials} == {"complete"}
    notices = [event.text for _, event in events if isinstance(event, Notice)]
    assert "No more than 2 trials train at a time: no room" in notices


def test_a_search_goes_on_though_fewer_fit_than_were_drawn(home, monkeypatch):
    def fits(plan: Any, _: Any) -> None:
        if plan.memory.optimizer.value > 2 * most:
            raise DoesNotFit("no room")

    config = veneer.SearchConfig(trials=4, together=4, pruner="none")
    own, over = recipe(home, "deferred"), {"lr": [0.01, 0.02, 0.03, 0.04]}
    events = veneer.search(own, over, config)
    plan = next(event.plan for _, event in events if isinstance(event, Planned))
    most = plan.memory.optimizer.value
    monkeypatch.setattr(many_runs, "check_fits_together", fits)
    for _, event in events:
        if isinstance(event, Notice) and event.text.startswith("No more than 2 trials"):
            events.close()
    trials = [*veneer.search(own, over, config, resume=True)][-1][1].result.trials
    assert [trial.state for trial in trials] == ["complete"] * 4


def test_what_is_left_out_of_the_rows_is_reported_beside_the_study(home):
    (home / "twice.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, ROWS[0]])))
    rows = veneer.DataConfig(eval_rows=2, deduplicate=True)
    own = replace(recipe(home, "twice"), data=home / "twice.jsonl", rows=rows)
    config = veneer.SearchConfig(trials=1)
    assert [*veneer.search(own, {"rank": [2]}, config)][-1][1].result.best is not None
    assert (own.out / "duplicates.txt").exists()


def test_a_share_is_one_of_each_trials_own_steps(home, monkeypatch):
    studies = Mock(side_effect=search_run.SearchStudy)
    monkeypatch.setattr(search_run, "SearchStudy", studies)
    own = recipe(home, "share")
    course = replace(own.training, steps=None, epochs=4.0)
    config = veneer.SearchConfig(trials=2, share=0.5, pruner="none")
    over = {"tokens_per_step": [30, 90]}
    trials = [*veneer.search(replace(own, training=course), over, config)][-1][1].result.trials
    steps = {trial.values["tokens_per_step"]: trial.steps for trial in trials}
    assert steps[30] > 2 * steps[90]
    assert studies.call_args.kwargs["steps"] == steps[90]  # so none is judged too early


def test_losses_on_other_rows_are_not_compared(home):
    with pytest.raises(veneer.ConfigError, match="A seed decides which rows are held out"):
        list(veneer.search(recipe(home, "seeds"), {"seed": [1, 2]}, CONFIG))


def test_how_a_trial_trains_is_news_once_and_what_it_is_made_ready_with_is_none():
    trials = object.__new__(_Trials)
    trials.unsaid, trials.attached, trials.noticed, trials.steps = [], set(), set(), {}
    alone, ready = (
        Notice("Its steps have passes of their own."),
        ModelReady(Mock(), (), "float32", None),
    )
    for name, news in (("000", [alone]), ("001", [])):
        assert not list(trials.take(name, Notice("The rows are short.")))
        assert not list(trials.take(name, ready))
        assert [event for _, event in trials.take(name, alone)] == news
        assert list(trials.take(name, Started(9, 0)))
        assert not list(trials.take(name, Notice(f"The loss of {name} stands out.")))


def test_no_trial_begins_after_the_minutes_however_many_have_ended_since(monkeypatch):
    trials = object.__new__(_Trials)
    trials.config, trials.asked_to_stop = veneer.SearchConfig(minutes=1), lambda: False
    trials.waiting, trials.most = [], 24
    trials.study, trials.drawn = SimpleNamespace(seconds=0.0, ask=lambda: pytest.fail("late")), 0
    trials.began = trials.counted = 0.0
    for now in (50.0, 61.0):
        monkeypatch.setattr("time.perf_counter", lambda now=now: now)
        trials._note_seconds()
    assert trials._next(3) == {}
    assert trials.study.seconds == 61


@pytest.mark.slow  # the parts are held in test_search_space.py, and by the search above
def test_a_grid_trains_every_combination_once(home):
    config = veneer.SearchConfig(sampler="grid", pruner="none", trials=9)
    over = {"rank": [1, 3], "lr": [0.01, 0.02]}
    result = [*veneer.search(recipe(home, "grid"), over, config)][-1][1].result
    values = [trial.values for trial in sorted(result.trials, key=lambda trial: trial.number)]
    assert values == [{"rank": r, "lr": lr} for r in (1, 3) for lr in (0.01, 0.02)]
    assert {trial.state for trial in result.trials} == {"complete"}


def test_what_trials_would_have_cost_alone():
    cost = Cost(seconds=50.0, tokens=1000, all_tokens=4000, alone=40.0)
    assert cost.one_after_another == 100.0
    assert "in about 100 s at the 40 tokens/s" in str(cost)
    assert Cost(50.0, 1000, 4000, None).one_after_another is None
