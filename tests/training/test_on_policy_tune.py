"""`tune` on samples: from a file of prompts and a reward by its name to an adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import veneer
from support.random_adapters import tokenizer
from support.runs import of
from support.tiny_models import tiny
from veneer.errors import ConfigError, TrainingError
from veneer.formats.merged import write_model
from veneer.generate.runners.compiled import CompiledRunner
from veneer.kernels import native
from veneer.objectives.config import Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.plan.config import PlanConfig
from veneer.plan.find import sizes_of
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan, replanned
from veneer.run_directory import RunDirectory
from veneer.training import metric_names
from veneer.training.events import DataReady, Planned, Stopped, Verdict
from veneer.training.planned import with_rows
from veneer.training.recipe import Recipe


@pytest.fixture
def recipe(tmp_path):
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    rows = [{"prompt": text, "references": ["a"]} for text in ("Name it", "Say it", "And now?")]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        str(tmp_path / "base"),
        data,
        lora=veneer.LoRA(rank=2),
        training=veneer.TrainConfig(steps=3, lr=0.01),
        objective=Objective("grpo"),
        on_policy=OnPolicy(
            reward=("regex:[aeiou]", "exact"),
            reward_weights=(1.0, 0.5),
            group_size=4,
            prompts_per_step=2,
            max_new_tokens=6,
        ),
        dtype="float32",
        out=tmp_path / "out",
    )


def test_a_recipe_trains_on_samples_and_goes_on(recipe, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps({"prompt": "Which one?", "references": ["b"]}) + "\n")
    recipe = replace(
        recipe,
        rows=replace(recipe.rows, eval_data=others),
        on_policy=replace(recipe.on_policy, eval_answers=3),
    )
    stop = iter([False, True])
    first = list(veneer.tune(recipe, should_stop=lambda: next(stop)))
    assert of(Stopped, first)
    (ready,), (planned,) = of(DataReady, first), of(Planned, first)
    assert (ready.summary.rows, ready.held_out.rows) == (3, 1)
    assert not any(learnt for _, learnt in ready.example)
    assert planned.plan is not None
    other = replace(recipe, on_policy=replace(recipe.on_policy, group_size=3))
    with pytest.raises(TrainingError, match=r"group_size \(4 there, 3 here\)"):
        list(veneer.tune(other, resume=True))
    rest = list(veneer.tune(recipe, resume=True))
    (verdict,) = of(Verdict, rest)
    assert "held-out reward" in verdict.text
    both = RunDirectory(recipe.out).read_metrics()
    lines, evaluated = [x for x in both if "loss" in x], [x for x in both if "eval_loss" in x]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in evaluated] == [0, 2, 3]  # before, and behind each epoch
    for line in evaluated:
        reward = line["eval_reward/regex:[aeiou]"] + 0.5 * line["eval_reward/exact"]
        assert line["eval_reward"] == -line["eval_loss"] == pytest.approx(reward)
        assert line["eval_reward/regex:[aeiou]"] in (
            0,
            pytest.approx(1 / 3),
            pytest.approx(2 / 3),
            1,
        )
    for line in lines:
        reward = line["reward/regex:[aeiou]"] + 0.5 * line["reward/exact"]
        assert line["reward"] == pytest.approx(reward)
        names = {"reward/NAME" if "/" in name else name for name in line}
        assert names - metric_names.STEPS.keys() <= metric_names.SAMPLES.keys()
    assert (recipe.out / "samples.html").exists()
    assert (recipe.out / "lora_adapter").is_dir()
    assert (recipe.out / "recipe.yaml").read_text().count("regex:[aeiou]") == 1


def test_rewards_are_looked_at_before_the_base_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr("veneer.training.tune.load_base", lambda *_, **__: pytest.fail("loaded"))
    wrong = replace(recipe, on_policy=OnPolicy(reward=("regex:(", "magic")))
    with pytest.raises(ConfigError, match=r"(?s)2 reasons.*no regular expression.*'magic' names"):
        list(veneer.tune(wrong))
    with pytest.raises(ConfigError, match="long_rows and on_spike would do nothing with samples"):
        replace(
            recipe,
            rows=replace(recipe.rows, long_rows="cut"),
            training=replace(recipe.training, on_spike="stop"),
        )
    with pytest.raises(ConfigError, match="none of them is held out; give others by eval_data"):
        replace(recipe, rows=replace(recipe.rows, eval_rows=2))
    with pytest.raises(ConfigError, match="eval_answers would do nothing without prompts"):
        replace(recipe, on_policy=replace(recipe.on_policy, eval_answers=2))
    with pytest.raises(ConfigError, match="which jobs do not draw together"):
        list(veneer.tune_many({"a": recipe}))


@pytest.mark.skipif(native.library_of("decode")[0] is None, reason="no C++ compiler")
def test_keys_and_values_of_answers_are_planned_as_they_are_held(recipe):
    model, longest = tiny("llama"), 300
    policy = replace(recipe.on_policy, group_size=64, max_new_tokens=200)
    training = veneer.TrainConfig(tokens_per_step=64)
    recipe = replace(recipe, on_policy=policy, training=training)
    sizes = sizes_of(model.config)
    adapted = adapted_layers(sizes, veneer.LoRA())
    plan = with_rows(make_plan(PlanConfig(dtype="float32"), sizes, adapted), recipe, longest)
    row = CompiledRunner(model, 1, longest)._cache_for(0, longest)
    held = 64 * (row.keys.nbytes + row.values.nbytes)
    assert plan.memory.workspace.value == held
    assert replanned(plan, plan.config).memory == plan.memory
    answers = replace(recipe, objective=Objective(), on_policy=OnPolicy())
    assert with_rows(plan, answers, longest).memory.workspace.value < held
