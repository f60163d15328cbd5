"""A run on its own samples learns what a teacher gives them, whoever teaches, and goes on as if it
had never stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import veneer
from support.prompts import prompts
from support.random_adapters import (
    examples,
    shake,
    tokenizer,
    trained_weights,
    with_new_tokens,
)
from support.runs import new_model, of
from support.tiny_gguf import random_model
from support.tiny_gguf import write_model as write_gguf
from support.tiny_models import quantized, tiny
from veneer.adapter.use import in_use
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError, TrainingError
from veneer.formats.merged import write_model
from veneer.fused.forward import choose_forward
from veneer.objectives.config import Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.run_directory import RunDirectory
from veneer.training import metric_names
from veneer.training.begin import let_train
from veneer.training.events import (
    DataReady,
    Evaluated,
    Notice,
    Planned,
    Step,
    Stopped,
    Verdict,
)
from veneer.training.live_teacher import BASE, bytes_of_live_teacher, is_adapter, teaching
from veneer.training.on_policy.run import train_on_policy
from veneer.training.recipe import Recipe

COURSE = veneer.TrainConfig(lr=0.01, steps=3, warmup=0, tokens_per_batch=60)
SHORT = OnPolicy(group_size=2, prompts_per_step=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """Return the directory of an adapter that says something else than the base."""
    place = tmp_path_factory.mktemp("teacher") / "adapter"
    veneer.save(shake(new_model(rank=4), size=0.3), place)
    return str(place)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    """Return the directory of a model of another kind with the same tokens."""
    place = tmp_path_factory.mktemp("model") / "qwen2"
    write_model(tiny("qwen2"), tokenizer(), place)
    return str(place)


def run(model, teacher, course=COURSE, config=SHORT, *, out=None, settings=None, **options):
    return list(
        train_on_policy(
            *(model, tokenizer(), prompts(), course),
            objective=Objective("distill", teacher=teacher, on_policy=True, **(settings or {})),
            on_policy=config,
            rewards=[],
            directory=None if out is None else RunDirectory(out),
            **options,
        )
    )


def student(teacher: str | None = None):
    """Return a model with a fresh adapter, or with that of the teacher, which trains."""
    if teacher is None:
        return new_model()
    model = veneer.load(tiny("llama"), teacher)
    let_train(model, "default")
    return model


@pytest.mark.parametrize(
    "divergence",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("forward", "reverse")), "jsd"],
)
def test_a_teacher_equal_to_the_student_teaches_nothing(teacher, divergence):
    settings = {"divergence": divergence}
    (step,) = of(Step, run(student(teacher), teacher, replace(COURSE, steps=1), settings=settings))
    assert abs(step.loss) <= 1e-6
    (far,) = of(Step, run(student(), teacher, replace(COURSE, steps=1), settings=settings))
    assert far.loss >= 1e-2


SLOW = [pytest.param(which, marks=pytest.mark.slow) for which in ("adapter", "model")]


@pytest.mark.parametrize("which", ["base", *SLOW])  # an adapter teaches a recipe below
def test_a_student_comes_nearer_to_whoever_teaches(teacher, other_model, which):
    """And what acts and trains afterwards is what did before."""
    model = student(teacher if which == "base" else None)
    names, weights = in_use(model), [*trained_weights(model)]
    modules = [type(module) for module in model.modules()]
    before = {n: w.clone() for n, w in model.named_parameters() if not w.requires_grad}
    course = replace(COURSE, lr=0.05, steps=8, schedule="constant", eval_every=8)
    source = {"adapter": teacher, "base": BASE, "model": other_model}[which]
    events = run(model, source, course, held_out=prompts())
    steps, (first, last) = (
        of(Step, events),
        of(Evaluated, events)[:: len(of(Evaluated, events)) - 1],
    )
    assert last.eval_loss < 0.9 * first.eval_loss
    for step in steps:
        assert step.metrics["largest_sampler_gap"] < 1e-3
        assert step.metrics["sampler_gap"] >= abs(step.metrics["sampler_bias"])
        assert not {"reward", "equal_groups", "reward_faults"} & step.metrics.keys()
    assert (in_use(model), [*trained_weights(model)]) == (names, weights)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters() if n in before)


def test_a_model_of_fewer_tokens_gives_its_logits_also_behind_one_that_it_lacks(tmp_path):
    """A student may draw tokens that only fill up its vocabulary."""
    fewer = tiny("qwen2")
    fewer.resize_token_embeddings(90)
    write_model(fewer, tokenizer(90), tmp_path / "fewer")
    model, known = new_model(), examples([9, 7], vocabulary=90)
    forward, _ = choose_forward(model, known)
    drawn = Example([3, 95, 8, 94, 7], [UNLABELLED, 95, 8, 94, 7], "a sample", 0)
    with teaching(str(tmp_path / "fewer"), model, tokenizer(90), known) as teacher:
        logits = teacher.on(forward, pack([drawn], [0]))(0, 4)
    with torch.no_grad():
        expected = fewer(torch.tensor([[3, 89, 8, 89, 7]])).logits[0, :-1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_slower_way_of_the_teacher_is_announced(other_model, monkeypatch):
    monkeypatch.setattr(
        "veneer.training.live_teacher.choose_forward",
        lambda *rows, **options: (choose_forward(*rows, **options)[0], ["Rows are padded."]),
    )
    events = run(student(), other_model, replace(COURSE, steps=1))
    assert "Of the teacher: Rows are padded." in [notice.text for notice in of(Notice, events)]
    assert of(Step, events)[0].loss > 0


def test_an_adapter_is_known_from_a_model_by_what_is_there(teacher, other_model, tmp_path):
    gguf = random_model("llama")
    (tmp_path / "one").mkdir()
    write_gguf("llama", gguf, tmp_path / "one" / "model.gguf")
    veneer.attach(gguf, veneer.LoRA(rank=2))
    veneer.save(gguf, tmp_path / "adapter.gguf", format="gguf")
    for place in (teacher, tmp_path / "adapter.gguf", tmp_path):
        assert is_adapter(str(place))
    for place in (other_model, tmp_path / "one", tmp_path / "one" / "model.gguf", "a/name", BASE):
        assert not is_adapter(str(place))


def nf4():
    return veneer.attach(quantized("llama"), veneer.LoRA(rank=2, targets="all"), seed=0)


@pytest.mark.parametrize(
    ("base", "which"),
    [
        (new_model, "adapter"),
        pytest.param(nf4, "adapter", marks=pytest.mark.slow),
        pytest.param(new_model, "model", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(base, which, other_model, tmp_path):
    place = other_model
    if which == "adapter":
        place = str(tmp_path / "teacher")
        veneer.save(shake(base(), size=0.3), place)
    course, config = replace(COURSE, save_every=1, steps=2), replace(SHORT, updates=2)
    whole, resumed = base(), base()
    events = run(whole, place, course, config, out=tmp_path / "whole")
    stop = iter([True])
    out = tmp_path / "cut"
    first = run(base(), place, course, config, out=out, should_stop=partial(next, stop))
    assert of(Stopped, first)[0].step == 1
    rest = run(resumed, place, course, config, out=out, resume=True)
    expected, own = trained_weights(whole), trained_weights(resumed)
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert [step.loss for step in [*of(Step, first), *of(Step, rest)]] == [
        step.loss for step in of(Step, events)
    ]
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    if which == "adapter":  # which is another one now
        veneer.save(shake(base(), seed=8), place)
        with pytest.raises(TrainingError, match="teacher_digest"):
            run(base(), place, course, config, out=out, resume=True)


def test_what_cannot_teach_samples_is_refused_by_name(teacher, tmp_path):
    prefix = tmp_path / "prefix"
    veneer.save(veneer.attach(tiny("llama"), veneer.Method("prefix", virtual_tokens=2)), prefix)
    write_model(tiny("llama"), tokenizer(90), tmp_path / "model")
    for name, error, says in (
        (str(prefix), ConfigError, "it has virtual tokens"),
        (str(tmp_path / "model"), ConfigError, "of the student's tokens 6 are none of its own"),
        (str(tmp_path / "nothing"), Exception, "nothing"),
        ("https://server/v1", ConfigError, "a server gives its likeliest alone"),
    ):
        with pytest.raises(error, match=says):
            run(student(), name)
    with pytest.raises(AdapterError, match="does not fit the base"):
        run(veneer.attach(tiny("qwen2"), veneer.LoRA(rank=2)), teacher)
    extended = tiny("llama")
    with_new_tokens(extended, tokenizer())
    with pytest.raises(ConfigError, match="have no new tokens yet, and the model has some"):
        run(veneer.attach(extended, veneer.LoRA(rank=2)), BASE)


@pytest.fixture
def recipe(teacher, tmp_path) -> Recipe:
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    rows = [{"prompt": text} for text in ("Name it", "Say it", "And now?")]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        str(tmp_path / "base"),
        data,
        lora=veneer.LoRA(rank=2),
        training=veneer.TrainConfig(steps=3, lr=0.01),
        objective=Objective("distill", teacher=teacher, on_policy=True),
        on_policy=replace(SHORT, group_size=1),
        dtype="float32",
        out=tmp_path / "out",
    )


def test_a_recipe_is_taught_on_samples(recipe, teacher, other_model):
    events = list(veneer.tune(recipe))
    (ready,), (planned,), (verdict,) = (of(kind, events) for kind in (DataReady, Planned, Verdict))
    assert not any(learnt for _, learnt in ready.example)
    assert "training loss" in verdict.text
    assert "--eval-data" in verdict.text
    steps = [line for line in RunDirectory(recipe.out).read_metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0].keys() - metric_names.STEPS.keys() <= metric_names.SAMPLES.keys()
    page = (recipe.out / "samples.html").read_text()
    assert "3 samples" not in page
    assert "9 samples in 3 steps" in page
    assert "reward" not in page
    assert "on_policy: true" in (recipe.out / "recipe.yaml").read_text()
    (held,) = (
        term.value for term in planned.plan.memory.weights.terms if term.note == "the teacher"
    )
    weights = veneer.load(tiny("llama"), teacher).named_parameters()
    assert held == 4 * sum(weight.numel() for name, weight in weights if "lora_" in name)
    by_model = replace(recipe, objective=replace(recipe.objective, teacher=other_model))
    held = bytes_of_live_teacher(by_model, torch.float32, tiny("llama").config)
    assert held == 4 * sum(weight.numel() for weight in tiny("qwen2").parameters())


def test_a_teacher_without_attention_is_planned(recipe, tmp_path):
    write_model(tiny("mamba"), tokenizer(), tmp_path / "mamba")
    by_mamba = replace(recipe.objective, teacher=str(tmp_path / "mamba"))
    recipe = replace(recipe, objective=by_mamba)
    held = bytes_of_live_teacher(recipe, torch.float32, tiny("llama").config)
    assert held == 4 * sum(weight.numel() for weight in tiny("mamba").parameters())


def test_what_does_not_go_with_a_teacher_of_samples_is_listed_at_once(recipe, tmp_path):
    settings = {"reward": ("exact",), "kl_weight": 0.1, "importance_cap": 2.0}
    with pytest.raises(ConfigError) as error:
        replace(
            recipe,
            on_policy=OnPolicy(**settings),
            training=replace(recipe.training, replay_passes=True),
            rows=replace(recipe.rows, new_words="a", deduplicate=True),
        )
    for what in (
        "reward, kl_weight, importance_cap would do nothing with distill",
        "replay_passes records passes of answers alone",
        "new_words are tokens that the teacher does not have",
        "deduplicate compares answers",
    ):
        assert what in str(error.value)
    with pytest.raises(ConfigError, match="which jobs do not draw together"):
        list(veneer.tune_many({"a": recipe}))
    recipe.data.write_text('{"answer": "no prompt"}\n{"prompt": ""}\n')
    with pytest.raises(Exception, match=r"(?s)prompts\.jsonl:1.*prompts\.jsonl:2"):
        list(veneer.tune(recipe))
    extended, words = tiny("llama"), tokenizer()
    with_new_tokens(extended, words)
    start = tmp_path / "extended"
    veneer.save(veneer.attach(extended, veneer.LoRA(rank=2)), start, tokenizer=words)
    with pytest.raises(ConfigError, match="extended has new tokens, which prompts and samples"):
        list(veneer.tune(replace(recipe, start_from=start)))
    wrong = replace(recipe.objective, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"(?s)reasons.*nowhere cannot teach"):
        list(veneer.tune(replace(recipe, objective=wrong, data=tmp_path / "none.jsonl")))
