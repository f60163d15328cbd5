"""Which adapters act: one, a mix, or none; and nothing of it is left behind."""

import pytest
import torch

import veneer
from support.random_adapters import logits, same, shake, snapshot, targets_named
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
def test_each_acts_as_it_does_alone(architecture, tmp_path):
    model = together(architecture, tmp_path)
    before, base = snapshot(model), logits(tiny(architecture))
    said = {name: logits(alone(architecture, name)) for name in TARGETS}
    assert veneer.in_use(model) == {"c": 1.0}
    assert list(veneer.adapters(model)) == list(TARGETS)
    for number in range(20):
        name = [*TARGETS, None][number % 4]
        veneer.use(model, name)
        assert veneer.in_use(model) == ({name: 1.0} if name else {})
        assert torch.equal(logits(model), base if name is None else said[name])
    assert same(snapshot(model), before)
    assert not torch.equal(said["a"], said["b"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mix_is_the_weighted_sum_of_changes(architecture, tmp_path):
    model = together(architecture, tmp_path)
    weights = {"a": 0.5, "b": -2.0, "c": 1.25}
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        veneer.use(model, name)
        for path, layer in lora_layers(model):
            deltas[path] = deltas.get(path, 0) + weight * layer.delta()
    veneer.use(model, weights)
    assert veneer.in_use(model) == weights
    said = logits(model)
    for path, layer in lora_layers(model):
        torch.testing.assert_close(layer.delta(), deltas[path], rtol=1e-5, atol=1e-6)
    veneer.detach(model)
    with torch.no_grad():
        for path, delta in deltas.items():
            module = model.get_submodule(path)
            transposed = type(module).__name__ == "Conv1D"
            # A tied head keeps the embedding's own rows.
            module.weight = torch.nn.Parameter(module.weight + (delta.T if transposed else delta))
    torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)


def test_weights_of_a_mix(tmp_path):
    model = together("llama", tmp_path)
    veneer.use(model, "a")
    said, base = logits(model), logits(tiny("llama"))
    veneer.use(model, {"a": 1})
    assert torch.equal(logits(model), said)
    veneer.use(model, {"a": 0.0, "b": 0.0})
    assert torch.equal(logits(model), base)
    veneer.use(model, {})
    assert torch.equal(logits(model), base)
    assert veneer.in_use(model) == {}


def test_names_that_are_unknown(tmp_path):
    model = together("llama", tmp_path)
    veneer.use(model, {"a": 1.0, "b": 0.5})
    said = logits(model)
    with pytest.raises(veneer.AdapterError, match=r"'aa'.*attached: a, b, c.*did you mean 'a'"):
        veneer.use(model, "aa")
    with pytest.raises(veneer.AdapterError, match="'x', 'y'"):
        veneer.use(model, {"a": 1.0, "x": 1.0, "y": 2.0})
    with pytest.raises(veneer.AdapterError, match="z"):
        veneer.detach(model, "z")
    assert veneer.in_use(model) == {"a": 1.0, "b": 0.5}
    assert torch.equal(logits(model), said)
    with pytest.raises(veneer.AdapterError, match="attached: none"):
        veneer.use(tiny("llama"), "a")


def test_names_that_are_taken(tmp_path):
    model = together("llama", tmp_path)
    before, said = snapshot(model), logits(model)
    with pytest.raises(veneer.AdapterError, match="'a' is attached already"):
        veneer.attach(model, veneer.LoRA(rank=1), name="a")
    with pytest.raises(veneer.AdapterError, match="'b' is attached already"):
        veneer.load(model, tmp_path / "a", name="b")
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), said)
    veneer.detach(model, "a")
    veneer.load(model, tmp_path / "a", name="a")
    veneer.use(model, "c")
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be(name, tmp_path):
    veneer.save(alone("llama", "a"), tmp_path / "a")
    model = tiny("llama")
    before, structure = snapshot(model), repr(model)
    for lay in (
        lambda: veneer.attach(model, veneer.LoRA(rank=1), name=name),
        lambda: veneer.load(model, tmp_path / "a", name=name),
    ):
        with pytest.raises(veneer.AdapterError, match="name"):
            lay()
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


def test_configurations_are_those_that_were_given():
    model = tiny("minigpt")
    given = veneer.LoRA(rank=3, targets="qv", dropout=0.1, rslora=True)
    veneer.attach(model, given, name="a")
    (found,) = veneer.adapters(model).values()
    assert (found.rank, found.dropout, found.rslora) == (3, 0.1, True)
    assert found.init == "gaussian"  # what auto comes to for this base
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
    said = logits(model)
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
    assert torch.equal(logits(model), said)


def test_dropout_keeps_the_mean():
    model = tiny("llama")
    veneer.attach(model, veneer.LoRA(rank=2, dropout=0.3, targets="q_proj"), name="a")
    veneer.attach(model, veneer.LoRA(rank=2, dropout=0.6, targets="q_proj"), name="b")
    veneer.use(model, {"a": 1.0, "b": 1.0})
    shake(model, size=0.3)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, base = layer(x), layer.original(x)
        layer.train()
        torch.manual_seed(0)
        found = layer(x.expand(20000, -1)).mean(dim=0)
    assert float((found - wanted).norm() / (wanted - base).norm()) < 0.05
