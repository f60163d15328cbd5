"""Stacks of experts are targets: what selects them, at which rank, with which factors."""

import copy
import json

import pytest
import torch

import veneer
from support.random_adapters import logits, shake
from support.tiny_models import tiny
from veneer.adapter.active import active_adapters_of
from veneer.adapter.report import report_targets
from veneer.adapter.targets import describe_base, resolve, with_expert_ranks
from veneer.errors import ConfigError

STACKS = {
    f"model.layers.{block}.mlp.experts.{name}"
    for block in (0, 1)
    for name in ("gate_up_proj", "down_proj")
}


def stacks_in(architecture, **settings):
    layers = resolve(tiny(architecture), veneer.LoRA(**settings))
    return {layer.path for layer in layers if layer.parameter}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", STACKS),
        ("mlp", STACKS),
        ("attention,mlp", STACKS),
        ("attention", set()),
        ("qv", set()),
        ("re:.", set()),  # patterns select layers, as PEFT's do
        ("gate_up_proj", {path for path in STACKS if path.endswith("gate_up_proj")}),
        ("mlp.gate.weight", {f"model.layers.{block}.mlp.gate.weight" for block in (0, 1)}),
    ],
)
def test_presets_select_stacks_and_no_router(targets, expected):
    assert stacks_in("mixtral", targets=targets) == expected


def test_slices_of_blocks_hold_for_stacks():
    assert stacks_in("mixtral", targets="all", layers="1") == {p for p in STACKS if ".1." in p}


def test_other_parameters_of_three_dimensions_are_no_experts():
    assert not [layer for layer in describe_base(tiny("gemma3")).layers if layer.is_stack]


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"rank": 8}, {"gate_up_proj": 2, "down_proj": 2}),
        ({"rank": 3}, {"gate_up_proj": 1, "down_proj": 1}),
        ({"rank": 3, "expert_rank": 5}, {"gate_up_proj": 5, "down_proj": 5}),
        (
            {"rank": 8, "rank_pattern": {"down_proj": 7}},  # the first pattern that matches wins
            {"gate_up_proj": 2, "down_proj": 7},
        ),
    ],
)
def test_the_rank_of_each_expert(settings, ranks):
    model = tiny("mixtral")  # 4 experts
    config = veneer.LoRA(targets="all", **settings)
    with pytest.warns(veneer.VeneerWarning, match="gate.weight"):
        veneer.attach(model, config)
    attached = active_adapters_of(model).configs["default"]
    for path in STACKS:
        assert attached.rank_of(path) == ranks[path.rpartition(".")[2]]
        factors = model.get_submodule(path.replace("experts.", "experts.parts.")).adapters.default
        assert factors.lora_A.shape[:2] == (4, attached.rank_of(path))
        assert factors.scaling == config.alpha / attached.rank_of(path)
    assert attached.rank_of("model.layers.0.self_attn.q_proj") == config.rank
    assert with_expert_ranks(attached, resolve(model, attached)) == attached


def test_a_block_of_another_rank_has_its_own_pattern():
    model = tiny("mixtral")
    config = veneer.LoRA(rank=8, targets="all", rank_pattern={"layers.0.mlp.experts.down_proj": 3})
    pattern = with_expert_ranks(config, resolve(model, config)).rank_pattern
    assert pattern == config.rank_pattern | {
        "experts.gate_up_proj": 2,
        "model.layers.1.mlp.experts.down_proj": 2,
    }


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_one_A_for_all_experts(architecture):
    model = tiny(architecture)
    config = veneer.LoRA(rank=2, expert_rank=3, targets="mlp", shared_expert_a=True)
    report = report_targets(model, config)
    with pytest.warns(veneer.VeneerWarning):
        veneer.attach(model, config)
    assert report.trained == sum(w.numel() for w in model.parameters() if w.requires_grad)
    for line in report.lines:
        owner, _, name = line.path.rpartition(".")
        adapter = model.get_submodule(f"{owner}.parts.{name}").adapters.default
        *_, out, in_ = line.layer.oriented
        assert adapter.lora_A.shape == (3, in_)
        assert adapter.lora_B.shape == (4, out, 3)


def test_a_stack_acts_as_one_with_the_same_A_for_each_expert():
    shared, apart = tiny("mixtral"), tiny("mixtral")
    for model, is_shared in ((shared, True), (apart, False)):
        veneer.attach(
            model, veneer.LoRA(rank=4, targets="experts.down_proj", shared_expert_a=is_shared)
        )
    shake(shared)
    adapters = zip(shared.named_parameters(), apart.parameters(), strict=True)
    with torch.no_grad():
        for (name, own), other in adapters:
            if "lora_" in name:
                other.copy_(own.expand(other.shape))
    torch.testing.assert_close(logits(shared), logits(apart))


def test_the_report_counts_stacks():
    report = report_targets(tiny("mixtral"), veneer.LoRA(rank=8, targets="all"))
    assert report.what == "8 layers adapted, and 4 stacks of 4 experts, rank 2 each"
    assert report_targets(tiny("llama"), veneer.LoRA(rank=8)).what == "8 layers adapted"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_rank": 2}, "expert_rank is 2, but no stack of experts is among the targets"),
        ({"shared_expert_a": True}, "shared_expert_a is True, but no stack of experts"),
    ],
)
def test_settings_of_experts_without_experts_are_refused(settings, message):
    with pytest.raises(veneer.TargetError, match=message):
        veneer.attach(tiny("llama"), veneer.LoRA(targets="all", **settings))
    with pytest.raises(veneer.TargetError, match=message):
        veneer.attach(tiny("mixtral"), veneer.LoRA(targets="attention", **settings))


@pytest.mark.parametrize(
    ("settings", "method"), [({"dora": True}, "DoRA"), ({"dropout": 0.1}, "dropout")]
)
def test_what_cannot_be_over_stacks_is_refused_before_anything_changes(settings, method):
    model = tiny("mixtral")
    before = copy.deepcopy(model.state_dict())
    message = f"{method} cannot be over .*experts.* and 1 more. Name the layers"
    for refused in (veneer.attach, report_targets):
        with pytest.raises(ConfigError, match=message):
            refused(model, veneer.LoRA(targets="all", **settings))
    assert before.keys() == model.state_dict().keys()
    veneer.attach(model, veneer.LoRA(targets=r"re:_proj$", **settings))


def test_expert_rank_must_be_a_rank():
    with pytest.raises(ConfigError, match="expert_rank is 0, but must be a whole number"):
        veneer.LoRA(expert_rank=0)


@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"init": "olora", "rslora": True}])
def test_starts_of_layers_are_folded_beside_stacks_without_one(settings, tmp_path):
    model = tiny("qwen3_moe")
    with pytest.warns(veneer.VeneerWarning):
        veneer.attach(model, veneer.LoRA(rank=4, targets="all", expert_rank=3, **settings))
    shake(model)
    for format in ("native", "peft"):
        veneer.save(model, tmp_path / format, format=format)
        again = veneer.load(tiny("qwen3_moe"), tmp_path / format)
        torch.testing.assert_close(logits(again), logits(model))


def test_files_of_earlier_versions_load_at_the_rank_that_they_have(tmp_path):
    model = tiny("mixtral")
    config = veneer.LoRA(rank=3, expert_rank=3, targets="q_proj,gate_up_proj,down_proj")
    veneer.save(shake(veneer.attach(model, config)), tmp_path)
    edited(tmp_path, rank_pattern={}, expert_rank=None)
    assert torch.equal(logits(veneer.load(tiny("mixtral"), tmp_path)), logits(model))


def test_all_in_a_file_without_stacks_means_layers_alone(tmp_path):
    model = tiny("mixtral")
    veneer.save(shake(veneer.attach(model, veneer.LoRA(rank=3))), tmp_path)
    edited(tmp_path, targets=["all"])
    assert torch.equal(logits(veneer.load(tiny("mixtral"), tmp_path)), logits(model))


def edited(directory, **settings):
    file = directory / "lora_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(
        json.dumps({k: v for k, v in config.items() if (k, v) != ("expert_rank", None)})
    )
