"""Which adapters act: one, a mix, or none; switching and detaching leave no trace."""

import peft
import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import copy_of, logits, same, shake, snapshot, targets_named
from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.layers import lora_layers

TARGETS = {"a": "attention", "b": "mlp", "c": "everything"}
# Names that mean something to the containers which hold adapters.
NAMES = ["a.b", "", "keys", "train", "items", "training", "forward"]


def config(model, name: str) -> veneer.LoRA:
    rank = 2 + list(TARGETS).index(name)
    return veneer.LoRA(rank=rank, targets=targets_named(model, TARGETS[name]))


def alone(architecture: str, name: str):
    model = tiny(architecture)
    return shake(veneer.attach(model, config(model, name), name=name), seed=ord(name))


def together(architecture: str, tmp_path):
    """Return a model with all three adapters, each with the values it has alone."""
    model = tiny(architecture)
    for name in TARGETS:
        veneer.save(alone(architecture, name), tmp_path / name)
        veneer.load(model, tmp_path / name, name=name)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned(one_in=3)
def test_each_acts_as_it_does_alone(architecture, tmp_path):
    model = together(architecture, tmp_path)
    before, base = snapshot(model), logits(tiny(architecture))
    outputs = {name: logits(alone(architecture, name)) for name in TARGETS}
    assert veneer.in_use(model) == {"c": 1.0}
    assert list(veneer.adapters(model)) == list(TARGETS)
    for number in range(20):
        name = [*TARGETS, None][number % 4]
        veneer.use(model, name)
        assert veneer.in_use(model) == ({name: 1.0} if name else {})
        assert torch.equal(logits(model), base if name is None else outputs[name])
    assert same(snapshot(model), before)
    assert not torch.equal(outputs["a"], outputs["b"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned(one_in=3, first=1)
def test_a_mix_is_the_weighted_sum_of_changes(architecture, tmp_path):
    model = together(architecture, tmp_path)
    weights = {"a": 0.5, "b": -2.0, "c": 1.25}
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        veneer.use(model, name)
        for path, layer in lora_layers(model):
            deltas[path] = deltas.get(path, 0) + weight * layer.delta().double()
    veneer.use(model, weights)
    assert veneer.in_use(model) == weights
    output = logits(model)
    for path, layer in lora_layers(model):
        assert_no_further(layer.delta(), deltas[path].float(), deltas[path], path)
    veneer.detach(model)

    def with_deltas(plain):
        with torch.no_grad():
            for path, delta in deltas.items():
                module = plain.get_submodule(path)
                # A tied head keeps the embedding's own rows.
                change = delta.T if type(module).__name__ == "Conv1D" else delta
                module.weight = torch.nn.Parameter(module.weight + change.to(module.weight.dtype))
        return logits(plain)

    reference = with_deltas(copy_of(model).double())
    assert_no_further(output, with_deltas(model), reference)


def test_weights_of_a_mix(tmp_path):
    model = together("llama", tmp_path)
    veneer.use(model, "a")
    output, base = logits(model), logits(tiny("llama"))
    veneer.use(model, {"a": 1})
    assert torch.equal(logits(model), output)
    veneer.use(model, {"a": 0.0, "b": 0.0})
    assert torch.equal(logits(model), base)
    veneer.use(model, {})
    assert torch.equal(logits(model), base)
    assert veneer.in_use(model) == {}


def test_names_that_are_unknown(tmp_path):
    model = together("llama", tmp_path)
    veneer.use(model, {"a": 1.0, "b": 0.5})
    output = logits(model)
    with pytest.raises(veneer.AdapterError, match=r"'aa'.*attached: a, b, c.*did you mean 'a'"):
        veneer.use(model, "aa")
    with pytest.raises(veneer.AdapterError, match="'x', 'y'"):
        veneer.use(model, {"a": 1.0, "x": 1.0, "y": 2.0})
    with pytest.raises(veneer.AdapterError, match="z"):
        veneer.detach(model, "z")
    assert veneer.in_use(model) == {"a": 1.0, "b": 0.5}
    assert torch.equal(logits(model), output)
    with pytest.raises(veneer.AdapterError, match="attached: none"):
        veneer.use(tiny("llama"), "a")


def test_names_that_are_taken(tmp_path):
    model = together("llama", tmp_path)
    before, output = snapshot(model), logits(model)
    with pytest.raises(veneer.AdapterError, match="'a' is attached already"):
        veneer.attach(model, veneer.LoRA(rank=1), name="a")
    with pytest.raises(veneer.AdapterError, match="'b' is attached already"):
        veneer.load(model, tmp_path / "a", name="b")
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), output)
    veneer.detach(model, "a")
    veneer.load(model, tmp_path / "a", name="a")
    veneer.use(model, "c")
    assert torch.equal(logits(model), output)


def test_what_is_no_model_of_ours_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"not a Base; pass its \.model or its \.tokenizer"):
        veneer.attach(veneer.Base("x", tiny("llama"), None), veneer.LoRA(rank=2))
    model = tiny("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(veneer.AdapterError, match=r"PEFT's.*save_pretrained.*merge_and_unload"):
        veneer.attach(model, veneer.LoRA(rank=2))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be(name, tmp_path):
    veneer.save(alone("llama", "a"), tmp_path / "a")
    model = tiny("llama")
    before, structure = snapshot(model), repr(model)
    for attach in (
        lambda: veneer.attach(model, veneer.LoRA(rank=1), name=name),
        lambda: veneer.load(model, tmp_path / "a", name=name),
    ):
        with pytest.raises(veneer.AdapterError, match="name"):
            attach()
        assert same(snapshot(model), before)
        assert repr(model) == structure
        assert veneer.adapters(model) == {}


def test_targets_that_do_not_fit_leave_the_model_as_it_was():
    model = alone("llama", "a")
    before, used = snapshot(model), veneer.in_use(model)
    trains = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(veneer.TargetError):
        veneer.attach(model, veneer.LoRA(rank=1, targets=["q_proj", "nothing"]), name="b")
    assert same(snapshot(model), before)
    assert [weight.requires_grad for weight in model.parameters()] == trains
    assert veneer.in_use(model) == used


def test_configurations_are_returned():
    model = tiny("minigpt")
    veneer.attach(model, veneer.LoRA(rank=3, targets="qv", dropout=0.1, rslora=True), name="a")
    (config,) = veneer.adapters(model).values()
    assert (config.rank, config.dropout, config.rslora) == (3, 0.1, True)
    assert config.init == "gaussian"  # what auto means for this base
    veneer.adapters(model).clear()
    veneer.in_use(model).clear()
    assert list(veneer.adapters(model)) == ["a"]
    assert veneer.in_use(model) == {"a": 1.0}


@pytest.mark.parametrize("mode", [False, True])
def test_an_adapter_takes_the_mode_of_its_model(mode, tmp_path):
    model = tiny("llama").train(mode)
    veneer.attach(model, veneer.LoRA(rank=2, dropout=0.5, targets="all"))
    assert all(module.training == mode for _, module in lora_layers(model))
    veneer.save(model, tmp_path / "a")
    loaded = veneer.load(tiny("llama").train(mode), tmp_path / "a")
    assert all(module.training == mode for _, module in lora_layers(loaded))


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_dropout_acts_in_training_alone(names):
    model = tiny("llama")
    for name in names:
        dropout = 0.0 if name == "b" else 0.5
        veneer.attach(model, veneer.LoRA(rank=2, targets="all", dropout=dropout), name=name)
    veneer.use(model, dict.fromkeys(names, 1.0))
    shake(model)
    assert torch.equal(logits(model), logits(model))
    output = logits(model)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    torch.manual_seed(0)
    first = logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    if "b" in names:
        veneer.use(model, "b")
        assert torch.equal(logits(model), logits(model))
        veneer.use(model, dict.fromkeys(names, 1.0))
    model.eval()
    assert torch.equal(logits(model), output)


def test_dropout_keeps_the_mean():
    model = tiny("llama")
    veneer.attach(model, veneer.LoRA(rank=2, dropout=0.3, targets="q_proj"), name="a")
    veneer.attach(model, veneer.LoRA(rank=2, dropout=0.6, targets="q_proj"), name="b")
    veneer.use(model, {"a": 1.0, "b": 1.0})
    shake(model, size=0.3)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, base = layer(x), layer.original(x)
        layer.train()
        torch.manual_seed(0)
        mean = layer(x.expand(20000, -1)).mean(dim=0)
    assert float((mean - expected).norm() / (expected - base).norm()) < 0.05
