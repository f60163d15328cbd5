"""Several runs over one base leave in each directory what a run alone would have left there."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from support.many_runs import one_by_one
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model
from veneer.run_directory import RunDirectory
from veneer.training import preflight
from veneer.training.events import (
    Checkpointed,
    Event,
    Failed,
    Measured,
    ModelReady,
    Planned,
    Started,
    Step,
    Written,
)
from veneer.training.many import planned
from veneer.training.many import train as many
from veneer.training.many import tune as many_runs

ROWS = [
    {"prompt": "veneer is thin"[: 3 + i], "completion": "walnut lacquer"[: 4 + i]} for i in range(8)
]
JOBS: dict[str, dict[str, Any]] = {
    "dora": {"lora": veneer.LoRA(rank=2, dora=True), "lr": 1e-3},
    "r=4 at 0.01": {"lora": veneer.LoRA(rank=4, dropout=0.2), "lr": 0.01, "eval": True},
    "wild": {"lora": veneer.LoRA(rank=1), "lr": 1e30, "clip": 0, "steps": 9},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("many")
    write_model(tiny("llama"), tokenizer(), place / "base")
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name in JOBS:
        with suppress(veneer.TrainingError):
            list(veneer.tune(recipe(place, "alone", name)))
    return place


def recipe(home: Path, out: str, name: str, **options: Any) -> veneer.Recipe:
    job = JOBS.get(name, JOBS["dora"])
    return veneer.Recipe(
        str(home / "base"),
        home / "rows.jsonl",
        lora=job["lora"],
        training=veneer.TrainConfig(
            lr=job["lr"],
            clip=job.get("clip", 1.0),
            steps=job.get("steps", 3),
            tokens_per_step=40,
            save_every=1,
        ),
        rows=veneer.DataConfig(eval_rows=2 if "eval" in job else 0),
        device="cpu",
        dtype="float32",
        out=home / out / name,
        **options,
    )


def recipes(home: Path, out: str) -> dict[str, veneer.Recipe]:
    return {name: recipe(home, out, name) for name in JOBS}


def files(place: Path) -> dict[str, Any]:
    """Return what is in a run's directory, without its own place and what is measured anew."""
    content: dict[str, Any] = {
        str(path.relative_to(place)): path.read_bytes().replace(str(place).encode(), b"")
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    run = RunDirectory(place)
    content["recipe.yaml"] = run.read_recipe() | {"out": None}
    measured = {"seconds", "rss_bytes"}
    lines = [{k: v for k, v in line.items() if k not in measured} for line in run.read_metrics()]
    return content | {"metrics.jsonl": lines}


@pytest.fixture(autouse=True)
def oracle(monkeypatch):
    monkeypatch.setattr(many, "backward_together", one_by_one)


def test_each_directory_is_that_of_a_run_alone_and_goes_on_after_a_kill(home):
    events: list[tuple[str, Event]] = []
    runs = veneer.tune_many(recipes(home, "together"))
    for name, event in runs:
        events.append((name, event))
        if sum(isinstance(event, Step) for _, event in events) == 4:
            runs.close()
            break
    assert isinstance(dict(reversed(events))[""], Planned)
    assert [name for name, event in events if isinstance(event, ModelReady)] == [*JOBS]
    with pytest.raises(veneer.ConfigError) as refused:
        list(veneer.tune_many(recipes(home, "together")))
    assert all(f"\n  - {name}: " in str(refused.value) for name in JOBS)
    # One that began with the others goes on alone, and one that began alone with the others.
    alone = [*veneer.tune(recipe(home, "together", "dora"), resume=True)]
    assert [event.done > 0 for event in alone if isinstance(event, Started)] == [True]
    assert files(home / "together" / "dora") == files(home / "alone" / "dora")
    begun = veneer.tune(recipe(home, "together", "twin"))
    next(event for event in begun if isinstance(event, Checkpointed))
    begun.close()
    jobs = recipes(home, "together") | {"twin": recipe(home, "together", "twin")}
    events = [*veneer.tune_many(jobs, resume=True)]
    assert [name for name, event in events if isinstance(event, Written)].count("dora") == 2
    assert all(event.done > 0 for _, event in events if isinstance(event, Started))
    assert [name for name, event in events if isinstance(event, Measured)] == [""]
    assert [name for name, event in events if isinstance(event, Failed)] == ["wild"]
    for name in JOBS:
        assert files(home / "together" / name) == files(home / "alone" / name)
    assert files(home / "together" / "twin") == files(home / "alone" / "dora")


def test_a_recipe_that_joins_is_what_it_is_alone_and_one_that_cannot_fails(home, monkeypatch):
    own = many_runs.attach_job

    def attach(prepared: Any, *arguments: Any, **options: Any) -> Any:
        if prepared.recipe.out.name == "unattached":
            raise veneer.AdapterError("cannot be attached")
        return own(prepared, *arguments, **options)

    monkeypatch.setattr(many_runs, "attach_job", attach)
    quantized = replace(recipe(home, "joined", "quantized"), bits=8)
    late = recipe(home, "joined", "r=4 at 0.01")
    unattached = {"unattached": recipe(home, "joined", "unattached")}
    first = {"dora": recipe(home, "joined", "dora")}
    cannot = {"quantized": quantized, **first}
    waiting = iter(({}, cannot, unattached, {"r=4 at 0.01": late}))
    locked = []

    def joining() -> dict[str, veneer.Recipe]:
        locked.append((home / "joined" / "dora" / ".lock").exists())
        return next(waiting, {})

    events = [*veneer.tune_many(first, joining=joining, merges=False)]
    names = ["dora", "r=4 at 0.01"]
    failed = {name: event.error for name, event in events if isinstance(event, Failed)}
    assert [*failed] == ["quantized", "dora", "unattached"]
    assert "bits is 8" in str(failed["quantized"])
    assert "a job of that name trains already" in str(failed["dora"])
    assert locked[:3] == [True, True, True]  # as long as it trains
    assert [name for name, event in events if isinstance(event, ModelReady)] == names
    for name in names:
        alone = {k: v for k, v in files(home / "alone" / name).items() if "merged" not in k}
        assert files(home / "joined" / name) == alone


def test_what_cannot_share_a_base_is_said_at_once(home):
    jobs = {
        "good": recipe(home, "bad", "good"),
        "other": recipe(home, "bad", "other", bits=8),
        "beside": recipe(home, "bad", "good"),
    }
    with pytest.raises(veneer.ConfigError) as refused:
        list(veneer.tune_many(jobs))
    assert "\n  - other: bits is 8, but None for the first job" in str(refused.value)
    assert "good is another job's directory too" in str(refused.value)
    assert not (home / "bad").exists()


def test_jobs_with_the_same_rows_have_invocations_of_their_own(home):
    invoked = replace(recipe(home, "rows", "other"), lora=veneer.LoRA(invocation=(95, 94)))
    jobs = {"good": recipe(home, "rows", "good"), "other": invoked}
    with pytest.raises(veneer.ConfigError, match="- other: None of 8 rows has the invocation"):
        list(veneer.tune_many(jobs))


def test_jobs_that_need_too_much_memory_are_refused_by_what_they_need_together(home, monkeypatch):
    monkeypatch.setattr(many_runs, "available_memory", lambda device: 10**6)
    with pytest.raises(veneer.ConfigError, match=r"These jobs .* 0.00 GB. Train fewer of them"):
        list(veneer.tune_many(recipes(home, "large")))


def test_jobs_are_refused_where_a_disk_holds_each_but_not_all(home, monkeypatch):
    jobs = recipes(home, "small disk")
    monkeypatch.setattr(planned, "bytes_on_disk", lambda *_, **__: {"the adapter": 10**6})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2.5e6))
    with pytest.raises(veneer.ConfigError, match=r"These jobs.* need 3 MB, but the disk has 2 MB"):
        next(veneer.tune_many(jobs))
    jobs.popitem()
    next(veneer.tune_many(jobs))


def test_no_room_is_asked_for_merged_models_that_are_not_written(home, monkeypatch):
    ahead = preflight.preflight(
        recipe(home, "small disk", "dora"), resume=False, force=False, ignore_space=True
    )
    assert ahead.plan is not None
    kept = ahead.plan.config.width * ahead.plan.model.parameters
    free = sum(preflight.bytes_on_disk(ahead.plan, ahead.recipe, torch.device("cpu")).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free - kept))
    job = {"dora": ahead.recipe}
    with pytest.raises(veneer.ConfigError, match="These jobs, up to that in"):
        next(veneer.tune_many(job))
    next(veneer.tune_many(job, merges=False))


def test_rows_of_answers_and_of_rewards_are_not_the_same(home):
    keys = set()
    for objective in ("dpo", "reward"):
        own = replace(recipe(home, "rows", "good"), objective=veneer.Objective(objective))
        keys.add(many_runs._key_of_rows(SimpleNamespace(recipe=own)))
    assert len(keys) == 2


def test_a_job_that_fails_before_its_course_leaves_nothing_behind(home, monkeypatch):
    own = many.RunningJob

    def begin(name: str, *arguments: Any) -> Any:
        if name == "job 1":
            raise veneer.AdapterError("another base's teacher")
        return own(name, *arguments)

    monkeypatch.setattr(many, "RunningJob", begin)
    waiting = iter(({}, {"late": recipe(home, "forgotten", "late")}))
    left = []

    def joining() -> dict[str, veneer.Recipe]:
        place = home / "forgotten" / "late"
        left.append((place / ".lock").exists())
        return next(waiting, {})

    first = {"dora": recipe(home, "forgotten", "dora")}
    events = [*veneer.tune_many(first, joining=joining, merges=False)]
    assert [name for name, event in events if isinstance(event, Failed)] == ["late"]
    assert not any(left)
    alone = {k: v for k, v in files(home / "alone" / "dora").items() if "merged" not in k}
    assert files(home / "forgotten" / "dora") == alone


def test_memory_is_planned_for_the_adapters_of_all_and_the_base_is_read_once(home, monkeypatch):
    reads = []

    def read(*arguments: Any) -> Any:
        reads.append(arguments)
        return own(*arguments)

    own = preflight.load_config_and_tokenizer
    monkeypatch.setattr(preflight, "load_config_and_tokenizer", read)
    events = veneer.tune_many(recipes(home, "planned"))
    plan = next(event.plan for _, event in events if isinstance(event, Planned))
    events.close()
    assert len(reads) == 1
    stored = [next((home / "alone" / name).glob("checkpoints/*/*.safetensors")) for name in JOBS]
    weights = [w for file in stored for key, w in load_file(file).items() if key[:8] == "weights/"]
    moments = 2 * 4 * sum(weight.numel() for weight in weights)
    assert plan.memory.optimizer.value == moments
