"""Every flag and every setting of a recipe arrives where it belongs."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from support.written_recipes import write_recipe
from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.cli.app import run
from veneer.objectives.config import Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.training.config import TrainConfig
from veneer.training.recipe import DataConfig, Recipe

GROUPS = {
    "method": Method,
    "lora": LoRA,
    "training": TrainConfig,
    "objective": Objective,
    "on_policy": OnPolicy,
    "rows": DataConfig,
}
# A value for each field that is not its default: as the flag takes it, and as it must arrive.
VALUES: dict[str, dict[str, tuple[object, object]]] = {
    "method": {
        "method": ("full", "full"),
        "trained_blocks": (3, 3),
        "train_head": (True, True),
        "train_norms": (True, True),
        "virtual_tokens": (7, 7),
        "prefix_mlp": (16, 16),
        "prompt_text": ("Say it:", "Say it:"),
    },
    "lora": {
        "rank": (5, 5),
        "alpha": (2.5, 2.5),
        "dropout": (0.25, 0.25),
        "targets": ("q_proj,re:v.*", ("q_proj", "re:v.*")),
        "layers": ("-4:", "-4:"),
        "rslora": (True, True),
        "init": ("gaussian", "gaussian"),
        "dora": (True, True),
        "lora_fa": (True, True),
        "invocation": ("<|assistant|>", "<|assistant|>"),
        "expert_rank": (2, 2),
        "shared_expert_a": (True, True),
        "rank_pattern": ({"q_proj": 3, r"layers\.0\..*": 2}, {"q_proj": 3, r"layers\.0\..*": 2}),
        "alpha_pattern": ({"Layers.1.k-proj": 1.5}, {"Layers.1.k-proj": 1.5}),
    },
    "training": {
        "epochs": (2.5, 2.5),
        "steps": (7, 7),
        "lr": (1e-3, 1e-3),
        "lora_plus_ratio": (8.0, 8.0),
        "schedule": ("linear", "linear"),
        "warmup": (10, 10),
        "weight_decay": (0.1, 0.1),
        "clip": (0.5, 0.5),
        "optimizer": ("adamw8bit", "adamw8bit"),
        "tokens_per_step": (512, 512),
        "tokens_per_batch": (128, 128),
        "recompute": ("selective", "selective"),
        "replay_passes": (True, True),
        "context_parallel": (2, 2),
        "on_spike": ("skip", "skip"),
        "seed": (3, 3),
        "save_every": (4, 4),
        "keep": (3, 3),
        "keep_best": (3, 3),
        "eval_every": (6, 6),
        "patience": (2, 2),
    },
    "objective": {
        "objective": ("orpo", "orpo"),
        "beta": (0.25, 0.25),
        "label_smoothing": (0.125, 0.125),
        "simpo_margin": (0.75, 0.75),
        "nll_weight": (0.5, 0.5),
        "desirable_weight": (1.5, 1.5),
        "undesirable_weight": (1.25, 1.25),
        "reward_centre": (0.01, 0.01),
        "reference": ("start", "start"),
        "teacher": ("a/teacher", "a/teacher"),
        "teacher_model": ("large", "large"),
        "on_policy": (True, True),
        "divergence": ("reverse", "reverse"),
        "jsd_beta": (0.25, 0.25),
        "teacher_top_k": (16, 16),
        "distill_temperature": (1.5, 1.5),
    },
    "on_policy": {
        "reward": ("exact", ("exact",)),
        "reward_weights": (0.5, (0.5,)),
        "reward_seconds": (2.5, (2.5,)),
        "on_reward_fault": ("stop", "stop"),
        "group_size": (4, 4),
        "prompts_per_step": (3, 3),
        "max_new_tokens": (64, 64),
        "updates": (2, 2),
        "eval_answers": (3, 3),
        "kl_weight": (0.04, 0.04),
        "clip_low": (0.1, 0.1),
        "clip_high": (0.28, 0.28),
        "loss_level": ("token", "token"),
        "scale_rewards": (False, False),
        "overlong_margin": (16, 16),
        "resample": (3, 3),
        "importance_cap": (2.0, 2.0),
    },
    "rows": {
        "limit": (9, 9),
        "max_length": (77, 77),
        "long_rows": ("drop", "drop"),
        "eval_rows": (5, 5),
        "eval_data": ("held/out.jsonl", Path("held/out.jsonl")),
        "skip_bad_rows": (True, True),
        "deduplicate": (True, True),
        "new_words": ("auto", "auto"),
    },
    "": {
        "device": ("cpu", "cpu"),
        "dtype": ("bf16", "bf16"),
        "bits": (4, 4),
        "pack_head": (True, True),
        "shard": ("base", "base"),
        "offload": ("disk", "disk"),
        "out": ("some/where", Path("some/where")),
        "start_from": ("an/adapter", Path("an/adapter")),
        "model": ("another/model", "another/model"),
        "data": ("other.jsonl", Path("other.jsonl")),
    },
}
SETTINGS = [(group, name) for group, values in VALUES.items() for name in values]
FLAGS = {"start_from": "from"}  # where the flag has another name, for Python's sake
# What a setting needs beside it, so that it is not idle.
BESIDE = {name: {"eval_rows": 1} for name in ("keep_best", "eval_every", "patience")}
BESIDE["pack_head"] = {"bits": 4}
BESIDE |= {n: {"method": "freeze"} for n in ("trained_blocks", "train_head", "train_norms")}
BESIDE |= {n: {"method": "prefix"} for n in ("virtual_tokens", "prefix_mlp")}
BESIDE["prompt_text"] = {"method": "prompt"}
BESIDE |= {n: {"objective": "dpo"} for n in ("beta", "label_smoothing", "reference")}
BESIDE |= {n: {"objective": "kto"} for n in ("desirable_weight", "undesirable_weight")}
BESIDE |= {"simpo_margin": {"objective": "simpo"}, "nll_weight": {"objective": "cpo"}}
BESIDE |= {"reward_centre": {"objective": "reward"}}
TAUGHT = {"objective": "distill", "teacher": "a/teacher"}
BESIDE |= dict.fromkeys(("divergence", "teacher_top_k", "distill_temperature", "on_policy"), TAUGHT)
BESIDE["teacher_model"] = TAUGHT | {"teacher": "http://localhost:8000/v1"}
BESIDE["jsd_beta"] = TAUGHT | {"divergence": "jsd"}
BESIDE["teacher"] = {"objective": "distill"}
SAMPLES = {"objective": "grpo", "reward": "exact"}
BESIDE |= dict.fromkeys(VALUES["on_policy"], SAMPLES)
BESIDE["reward"] = {"objective": "grpo"}
BESIDE["eval_answers"] = SAMPLES | {"eval_data": "held_out"}
# What follows from a setting that is left as it is.
FOLLOWS = {"rank": ["alpha"], "on_policy": ["divergence"], "teacher_model": ["teacher_top_k"]}
FOLLOWS |= {n: ["method", "trained_blocks"] for n in BESIDE if n.startswith("train")}
FOLLOWS |= {n: ["virtual_tokens"] for n in ("virtual_tokens", "prefix_mlp", "prompt_text")}
METHODS = ("lora", "full", "freeze", "prefix", "prompt")
SWITCHES = ("resume", "force", "ignore_plan", "quiet")
OPTIONS = dict.fromkeys(SWITCHES, False) | {"track": (), "as_json": False}


def test_the_table_of_values_is_complete():
    for group, kind in GROUPS.items():
        assert list(VALUES[group]) == [field.name for field in fields(kind)]
    assert set(VALUES[""]) == {field.name for field in fields(Recipe)} - set(GROUPS)


def arrived(recipe: Recipe, group: str, name: str) -> object:
    return getattr(getattr(recipe, group) if group else recipe, name)


def flag(name: str, value: object) -> list[str]:
    option = f"--{FLAGS.get(name, name).replace('_', '-')}"
    if value is True:
        return [option]
    if value is False:
        return [f"--no-{name.replace('_', '-')}"]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


def default(group: str, name: str) -> object:
    whole = Recipe("m", Path("d"))
    return arrived(whole, group, name)


def together(method: str) -> dict[str, object]:
    """Return a recipe of all settings that go together with a method."""
    foreign = {n for n, beside in BESIDE.items() if beside.get("method", method) != method}
    if method == "prompt":
        foreign.remove("virtual_tokens")
    if method != "lora":
        foreign |= {*VALUES["lora"], "lora_plus_ratio"}
    if method in ("full", "freeze"):
        foreign |= {"bits", "pack_head", "shard", "offload"}
    if method in ("prefix", "prompt"):
        foreign.add("context_parallel")
    foreign |= {"invocation", *VALUES["objective"], *VALUES["on_policy"]}  # which exclude others
    everything = {
        name: given for values in VALUES.values() for name, (given, _) in values.items()
    } | {"eval_rows": 0, "method": method, "shard": "none"}  # eval_data and offload exclude others
    return {FLAGS.get(n, n): value for n, value in everything.items() if n not in foreign}


def test_several_data_arrive_together_and_from_a_recipe(caught, tmp_path):
    several = ["a.jsonl:0.7", "b.parquet:0.3"]
    flags = [f"--data={several[0]}", "--data", several[1]]
    assert run(["tune", "m", *flags, "--rank", "3"]) == 0
    assert (caught.recipe.data, caught.recipe.lora.rank) == (tuple(several), 3)
    path = write_recipe(tmp_path / "recipe.yaml", caught.recipe.settings())
    assert run(["tune", "--config", str(path)]) == 0
    assert caught.recipe.data == tuple(several)


def test_several_data_that_are_spelt_wrong_are_said(caught, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).touch()
    for arguments, says in [
        (["a.jsonl", "b.jsonl"], "--data a.jsonl --data b.jsonl"),
        (["--data", "a.jsonl", "--data", "--steps", "2"], "--data requires an argument"),
    ]:
        assert run(["tune", "m", *arguments]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


# The settings whose arrival from a recipe is seen for many at once, below.
IN_ONE = {
    name
    for method in METHODS
    for name, given in together(method).items()
    for values in VALUES.values()
    if name in values and values[name][0] == given and name != "method"
}
# Those of which each run sees several on one command line; each alone is a slow proof.
ALONE = {"model", "data", "eval_data", "eval_rows", "shard", "offload", *BESIDE}
SEVERAL = [each for each in SETTINGS if each[1] in IN_ONE - ALONE]
each_setting = pytest.mark.parametrize(
    "settings",
    [
        *(SEVERAL[i::6] for i in range(6)),
        *([each] for each in SETTINGS if each not in SEVERAL),
        *(pytest.param([each], marks=pytest.mark.slow) for each in SEVERAL),
    ],
    ids=lambda settings: ", ".join(name for _, name in settings),
)


def beside(settings: list[tuple[str, str]]) -> dict[str, object]:
    return {key: value for _, name in settings for key, value in BESIDE.get(name, {}).items()}


@each_setting
@pytest.mark.thinned(one_in=2, first=1)
def test_every_flag_arrives(caught, settings):
    values = {name: VALUES[group][name] for group, name in settings}
    given = {name: value for name, (value, _) in values.items()}
    names = {"model": "m", "data": "d"}
    if given.keys() & names.keys():
        arguments = [f"--{key}={value}" for key, value in (names | given).items()]
    else:
        flags = [word for each in (given | beside(settings)).items() for word in flag(*each)]
        arguments = [*names.values(), *flags]
    assert run(["tune", *arguments]) == 0
    for group, name in settings:
        assert arrived(caught.recipe, group, name) == values[name][1] != default(group, name)
    # And nothing else changes, but what follows from it.
    follows = {*names, *beside(settings), *(f for name in given for f in FOLLOWS.get(name, ()))}
    for group, other in SETTINGS:
        if other not in {*given, *follows}:
            assert arrived(caught.recipe, group, other) == default(group, other)


def overriding(group: str, name: str) -> tuple[list[str], object]:
    """Return a flag that gives a setting another value than VALUES does, and that value."""
    usual = default(group, name)
    if VALUES[group][name][1] is True:
        return [f"--no-{name.replace('_', '-')}"], False
    value = {
        "layers": "2:",
        "long_rows": "cut",
        "targets": "all",
        "rank_pattern": {"k_proj": 1},
        "alpha_pattern": {"k_proj": 2.0},
        "init": "kaiming",
        "method": "lora",
        "prompt_text": "Other:",
        "invocation": "<|other|>",
        "bits": 8,
        "new_words": "some",
        "eval_data": "more.jsonl",
        "start_from": "another/adapter",
        "teacher": "another/teacher",
        "reward": "tests",
        "model": "n",
        "data": "e",
    }.get(name, 1 if usual is None else usual)
    return flag(name, value), value


@each_setting
@pytest.mark.thinned(
    one_in=2
)  # the settings that the test above leaves out; each has its flag here
def test_every_setting_of_a_recipe_arrives_and_a_flag_overrides_it(caught, tmp_path, settings):
    given = {FLAGS.get(name, name): VALUES[group][name][0] for group, name in settings}
    whole = {"model": "m", "data": "d"} | beside(settings) | given
    recipe = write_recipe(tmp_path / "recipe.yaml", whole)
    if any(name not in IN_ONE for _, name in settings):
        assert run(["tune", "--config", str(recipe)]) == 0
        for group, name in settings:
            assert arrived(caught.recipe, group, name) == VALUES[group][name][1]
    flags = [word for each in settings for word in overriding(*each)[0]]
    assert run(["tune", "--config", str(recipe), *flags]) == 0
    for group, name in settings:
        _, value = overriding(group, name)
        overridden = arrived(caught.recipe, group, name)
        if name == "targets":
            value = ("all",)
        elif isinstance(overridden, tuple):
            value = (value,)
        elif isinstance(overridden, Path):
            value = Path(str(value))
        assert overridden == value != VALUES[group][name][1]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_arrives(caught, name):
    assert run(["tune", "m", "d"]) == 0
    assert caught.options == OPTIONS
    assert run(["tune", "m", "d", f"--{name.replace('_', '-')}"]) == 0
    assert caught.options == OPTIONS | {name: True}


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_a_recipe_arrive_together_and_are_read_back(caught, tmp_path, method):
    given = together(method)
    assert run(["tune", "--config", str(write_recipe(tmp_path / "all.yaml", given))]) == 0
    first = caught.recipe
    for group, name in SETTINGS:
        if name in IN_ONE and name in given:
            assert arrived(first, group, name) == VALUES[group][name][1]
    if method == "lora":
        assert asdict(first.lora)["rank_pattern"] == VALUES["lora"]["rank_pattern"][1]
    again = write_recipe(tmp_path / "again.yaml", first.settings())
    assert run(["tune", "--config", str(again)]) == 0
    assert caught.recipe == first


def test_settings_of_samples_are_read_back_as_the_same_recipe(caught, tmp_path):
    given = {name: value for name, (value, _) in VALUES["on_policy"].items()}
    given |= {"model": "m", "data": "d", "objective": "grpo", "reward": ["exact", "a.py:f"]}
    given |= {"reward_weights": [1, 0.5], "reward_seconds": None, "eval_data": "held_out"}
    assert run(["tune", "--config", str(write_recipe(tmp_path / "all.yaml", given))]) == 0
    first = caught.recipe
    assert first.on_policy.weights == (1.0, 0.5)
    assert first.on_policy.seconds == (10.0, 10.0)
    again = write_recipe(tmp_path / "again.yaml", first.settings())
    assert run(["tune", "--config", str(again)]) == 0
    assert caught.recipe == first


def test_an_objective_s_settings_are_read_back_as_the_same_recipe(caught, tmp_path):
    for flags in (
        ["--objective", "dpo", "--beta", "0.3", "--label-smoothing", "0.1", "--reference", "start"],
        ["--objective", "kto", "--desirable-weight", "1.5"],
        ["--objective", "distill", "--teacher", "t", "--on-policy", "--group-size", "1"],
    ):
        assert run(["tune", "m", "d", *flags]) == 0
        first = caught.recipe
        path = write_recipe(tmp_path / "recipe.yaml", first.settings())
        assert run(["tune", "--config", str(path)]) == 0
        assert caught.recipe == first


@pytest.mark.parametrize("invocation", ["<|assistant|>", (5, 9), (7,)])
def test_an_invocation_is_read_back_as_a_text_or_as_ids(caught, tmp_path, invocation):
    recipe = Recipe("m", ("d",), lora=LoRA(invocation=invocation))
    path = write_recipe(tmp_path / "recipe.yaml", recipe.settings())
    assert run(["tune", "--config", str(path)]) == 0
    assert caught.recipe.lora.invocation == invocation


def test_a_fraction_is_no_whole_number(refused):
    error = refused("tune", "m", "d", "--rank", "4.5", "--eval-rows", "0.1", "--steps", "3.0")
    assert "rank is 4.5, but must be a whole number; eval_rows is 0.1, but must" in error
    assert "steps" not in error
    assert "trials is 2.5" in refused("search", "m", "d", "--over", "rank=1,2", "--trials", "2.5")
    assert "max_new_tokens is 1.5" in refused("generate", "hi", "--max-new-tokens", "1.5")
