"""Runs of a comparison that train together measure what they would alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.comparison_jobs import ROWS, job, write_rows
from support.many_runs import one_by_one
from veneer.compare.config import CompareConfig
from veneer.compare.job import Job, Result
from veneer.compare.labels import LABELS
from veneer.compare.measure import measure
from veneer.compare.process import do_together
from veneer.compare.report import markdown
from veneer.compare.summary import Comparison
from veneer.compare.together import measure_together
from veneer.errors import ConfigError
from veneer.training.many import train as many

METHODS = ("lora", "rslora")


@pytest.fixture
def jobs(minigpt_home, tmp_path) -> list[Job]:
    general = write_rows(tmp_path / "general.jsonl", ROWS[:4])
    usual = {
        "model": str(minigpt_home),
        "data": str(write_rows(tmp_path / "rows.jsonl", ROWS[:12])),
        "general": str(general),
        "device": "cpu",
        "steps": 2,
        "eval_rows": 2,
    }
    return [job(name=f"{name}-seed0", label=LABELS[name], **usual) for name in METHODS]


def test_each_measures_what_it_does_alone_but_for_its_time(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "backward_together", one_by_one)
    messages: list = []
    together = {
        own.name: result for own, result in measure_together(jobs, tmp_path, messages.append)
    }
    assert [*together] == [own.name for own in jobs]
    for own in jobs:
        alone, shared = measure(own, tmp_path, lambda _: None), together[own.name]
        assert shared.together == len(jobs)
        assert shared.base_unchanged
        for name in ("eval_loss", "general_loss", "losses", "trained", "tokens", "kept", "base"):
            assert getattr(shared, name) == getattr(alone, name), name
        steps = [m["step"] for m in messages if m.get("job") == own.name and "step" in m]
        assert steps == [1, 2]


@pytest.mark.slow  # a process of its own; what it does is held above
def test_one_that_fails_leaves_the_others(jobs, tmp_path):
    wild = replace(jobs[0], name="wild", lr=1e30, steps=5)
    work = do_together([wild, *jobs], tmp_path / "runs")
    while True:
        try:
            next(work)
        except StopIteration as end:
            failed, *results = end.value
            break
    assert "not finite" in failed
    assert all(isinstance(result, Result) for result in results)
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {f"{own.name}.json" for own in jobs}


def test_times_are_said_to_be_shared(jobs):
    result = Result(
        base={}, base_parameters=9, dtype="float32", rows=9, held_out=2, tokens_a_step=5.0,
        eval_loss=1.0, trained=3, seconds=60.0, tokens_per_second=7.0, train_loss=1.0,
        peak=10**9, together=2,
    )  # fmt: skip
    config = CompareConfig(methods=METHODS, budget="steps:2", together=True)
    comparison = Comparison(
        model="m", data=Path("d.jsonl"), config=config, measure=None, base=result,
        courses=dict.fromkeys(METHODS, (2, 1e-3)),
        results={"lora": {0: result}, "rslora": {0: replace(result, together=1)}},
        errors={}, trials={},
    )  # fmt: skip
    lines = markdown(comparison).splitlines()
    (shared,) = (line for line in lines if line.startswith("| lora |"))
    (alone,) = (line for line in lines if line.startswith("| rslora |"))
    assert shared.count("shared") == 3
    assert "shared" not in alone
    assert "Shared: these runs trained together" in lines[-1]
    with pytest.raises(ConfigError, match="minutes are of a method's own training"):
        CompareConfig(budget="minutes:2", together=True)
