"""Virtual tokens as adapters: their start, training, switching, detaching, and what is refused."""

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import veneer
from support.closeness import assert_no_further
from support.random_adapters import (
    NEW_TOKENS,
    copy_of,
    distance,
    examples,
    ids,
    logits,
    same,
    shake,
    snapshot,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, VOCAB, quantized, tiny
from support.virtual import (
    COUNT,
    METHODS,
    exact,
    first_tokens,
    generated,
    new_model,
    prepend,
    virtual,
)
from veneer.adapter.virtual import PrefixMLP
from veneer.adapter.virtual_forward import ATTRIBUTE
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.training.events import Trained

COURSE = veneer.TrainConfig(steps=3, lr=0.05, warmup=0, tokens_per_step=40, tokens_per_batch=25)
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize(
    "config",
    [*map(virtual, METHODS), virtual("prefix", prefix_mlp=6)],
    ids=lambda config: config.method + " by an MLP" * bool(config.prefix_mlp),
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_only_the_virtual_tokens_train_and_detaching_leaves_no_trace(architecture, config):
    model = tiny(architecture)
    before, marks, looks = snapshot(model), fingerprint(model), repr(model)
    base = logits(model)
    veneer.attach(model, config, seed=3)
    start = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
    assert start
    assert all(name.startswith(f"{ATTRIBUTE}.adapters.default.") for name in start)
    assert all(weight.dtype == torch.float32 for weight in start.values())
    (*_, last) = veneer.train(model, examples([12, 9, 15, 20, 7, 11]), COURSE)
    assert isinstance(last, Trained)
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], weight) for name, weight in start.items())
    assert base_parameters(model).keys() == {n for n in after if n not in start}
    assert fingerprint(model) == marks
    assert not torch.equal(logits(model), base)
    veneer.use(model, None)
    assert torch.equal(logits(model), base)
    veneer.detach(model)
    assert same(snapshot(model), before)
    assert repr(model) == looks
    assert torch.equal(logits(model), base)
    decoder = model.get_decoder()
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks


def test_one_of_several_acts(tmp_path):
    model = tiny("llama")
    outputs = {"none": logits(model)}
    veneer.attach(model, virtual("prefix"), name="a", seed=1)
    veneer.attach(model, virtual("prompt"), name="b", seed=2)
    veneer.attach(model, virtual("prefix", virtual_tokens=3), name="c", seed=3)
    shake(veneer.attach(model, veneer.LoRA(rank=2), name="l"))
    for name in "abcl":
        veneer.use(model, name)
        outputs[name] = logits(model)
        alone = copy_of(model)
        for other in set("abcl") - {name}:
            veneer.detach(alone, other)
        assert torch.equal(logits(alone), outputs[name])
    assert len({tuple(x.flatten().tolist()) for x in outputs.values()}) == 5
    for mix in ({"a": 0.5}, {"a": 1, "b": 1}, {"a": 1, "l": 1}, {"b": 2.0}):
        with pytest.raises(veneer.AdapterError, match="virtual tokens"):
            veneer.use(model, mix)
        assert veneer.in_use(model) == {"l": 1.0}
    veneer.use(model, {"b": 1.0})
    assert torch.equal(logits(model), outputs["b"])
    veneer.detach(model, "b")
    assert torch.equal(logits(model), outputs["none"])
    with pytest.raises(veneer.AdapterError, match="are attached"):
        veneer.attach(veneer.detach(model, "l"), veneer.Method("full"))


def test_those_that_do_not_act_do_not_train():
    model = tiny("llama")
    veneer.attach(model, virtual("prompt"), name="a", seed=1)
    veneer.attach(model, virtual("prompt"), name="b", seed=2)
    for weight in getattr(model, ATTRIBUTE).parameters():
        weight.requires_grad_(True)
    before = {n: w.detach().clone() for n, w in getattr(model, ATTRIBUTE).named_parameters()}
    list(veneer.train(model, examples([12, 9]), COURSE))
    after = dict(getattr(model, ATTRIBUTE).named_parameters())
    changed = {n for n, w in before.items() if not torch.equal(after[n], w)}
    assert changed == {"adapters.b.embeddings"}


@each_method
def test_a_copy_is_a_model_of_its_own(method):
    model = new_model("llama", method)
    before, copy = logits(model), copy_of(model)
    assert torch.equal(logits(copy), before)
    with torch.no_grad():
        for weight in getattr(copy, ATTRIBUTE).parameters():
            weight.add_(1)
    assert not torch.equal(logits(copy), before)
    veneer.detach(copy)
    assert torch.equal(logits(copy), logits(tiny("llama")))
    assert torch.equal(logits(model), before)


@each_method
def test_merging_is_refused_while_they_act_and_leaves_them_out_otherwise(method):
    model = new_model("llama", method)
    with pytest.raises(veneer.AdapterError, match="virtual tokens"):
        veneer.merge(model)
    shake(veneer.attach(model, veneer.LoRA(rank=2), name="l"))
    adapted, plain = logits(model), veneer.merge(model)
    assert not hasattr(plain, ATTRIBUTE)
    assert plain.state_dict().keys() == tiny("llama").state_dict().keys()
    assert_no_further(logits(plain), adapted, logits(exact(model)))
    assert not plain.get_decoder()._forward_pre_hooks
    veneer.use(model, "default")
    assert distance(logits(model), adapted) > 0.01


def test_a_text_to_start_from_is_repeated_or_cut():
    model, tokens = tiny("qwen2"), tokenizer()
    for text in ("ab c", "a much longer text"):
        first = torch.tensor((tokens(text, add_special_tokens=False)["input_ids"] * COUNT)[:COUNT])
        longer = prepend(first, ids())
        peer, reference = (logits(x, longer)[:, COUNT:] for x in (model, exact(model)))
        veneer.attach(model, virtual("prompt", prompt_text=text), tokenizer=tokens)
        assert_no_further(logits(model), peer, reference)
        veneer.detach(model)


@each_method
def test_they_start_from_the_base_alone_whatever_acts(method):
    model, other = tiny("gpt2"), tiny("gpt2")
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all,wte"), name="l"))
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    for each in (model, other):
        veneer.attach(each, virtual(method), name="v", seed=3)
    ours, alone = (getattr(each, ATTRIBUTE).adapters["v"]() for each in (model, other))
    assert torch.equal(ours, alone)


@each_method
def test_the_seed_decides_the_start(method):
    def start(seed: int | None) -> Tensor:
        (weight,) = getattr(
            veneer.attach(tiny("llama"), virtual(method), seed=seed), ATTRIBUTE
        ).parameters()
        return weight

    model = tiny("llama")
    for name in "ab":
        veneer.attach(model, virtual(method), name=name)
    state = torch.get_rng_state()
    veneer.attach(copy_of(model), virtual(method), name="c", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    first, second = getattr(model, ATTRIBUTE).adapters.values()
    assert not torch.equal(first(), second())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_an_mlp_makes_what_pefts_makes(architecture):
    prefix = getattr(new_model(architecture, "prefix", prefix_mlp=7), ATTRIBUTE).adapters["default"]
    assert isinstance(prefix, PrefixMLP)
    layers, _, heads, count, dim = prefix().shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=heads * dim,
        num_layers=layers,
        num_attention_heads=heads,
        encoder_hidden_size=7,
        prefix_projection=True,
    )
    theirs = PrefixEncoder(config)
    values = [prefix.embeddings, prefix.W1, prefix.b1, prefix.W2, prefix.b2]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))

    def keys_values() -> Tensor:
        made = theirs(torch.arange(count)).view(count, layers, 2, heads, dim)
        return made.detach().permute(1, 2, 3, 0, 4)

    peer = keys_values()
    theirs.double()
    assert_no_further(prefix().detach(), peer, keys_values())


@each_method
def test_new_tokens_train_beside_them_and_are_saved(method, tmp_path):
    model, tokens = tiny("llama"), tokenizer()
    rows = with_new_tokens(model, tokens).parameters()
    shake(veneer.attach(model, virtual(method), seed=3))
    for weight in rows:
        weight.requires_grad_(True)
    before = [weight.detach().clone() for weight in rows]
    data = examples([14, 9, 20], vocabulary=VOCAB + len(NEW_TOKENS), seed=2)
    list(veneer.train(model, data, COURSE))
    assert not any(torch.equal(a, b) for a, b in zip(rows, before, strict=True))
    veneer.save(model, tmp_path / "out", tokenizer=tokens)
    fresh, its_tokens = tiny("llama"), tokenizer()
    veneer.load(fresh, tmp_path / "out", tokenizer=its_tokens)
    text = ids(vocabulary=VOCAB + len(NEW_TOKENS))
    assert torch.equal(logits(fresh, text), logits(model, text))
    assert its_tokens.get_vocab() == tokens.get_vocab()


@pytest.mark.parametrize("base", ["quantized", "bf16"])
@each_method
def test_over_another_base(method, base):
    model = quantized("llama") if base == "quantized" else tiny("llama", dtype=torch.bfloat16)
    longer = prepend(first_tokens(3), ids())
    peer, reference = (logits(x, longer)[:, COUNT:] for x in (model, exact(model)))
    veneer.attach(model, virtual(method), seed=3)
    assert logits(model).dtype == model.dtype
    assert_no_further(logits(model), peer, reference)
    (*_, last) = veneer.train(model, examples([12, 9]), COURSE)
    assert isinstance(last, Trained)
    assert generated(model, [ids(1)[0]])[0].shape == (1, 8)


# Refusals.


def refused(model: Any, config: veneer.Method, **options: Any) -> str:
    """Return why `config` is refused, having seen that the model stayed as it was."""
    before, looks = snapshot(model), repr(model)
    with pytest.raises(veneer.ConfigError) as caught:
        veneer.attach(model, config, **options)
    assert same(before, snapshot(model))
    assert repr(model) == looks
    assert veneer.adapters(model) == {}
    return str(caught.value)


@each_method
def test_a_context_that_is_too_small(method):
    message = refused(tiny("gpt2"), virtual(method, virtual_tokens=63))
    assert "63 virtual tokens leave no room in the model's context of 64" in message
    veneer.attach(tiny("gpt2"), virtual(method, virtual_tokens=62))


def test_a_text_without_a_tokenizer_or_tokens():
    assert "tokenizer" in refused(tiny("llama"), virtual("prompt", prompt_text="so"))
    tokens = tokenizer()
    assert "no tokens" in refused(
        tiny("llama"), virtual("prompt", prompt_text="\n"), tokenizer=tokens
    )


@each_method
def test_a_model_without_keys_and_values(method):
    config = MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, state_size=2)
    assert "keys and values in every layer" in refused(MambaForCausalLM(config), virtual(method))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_has_ended_is_no_fault_of_the_models_code(error):
    model = tiny("llama")

    def ends(*args: Any) -> None:
        raise error("Tried to allocate 2 GiB")

    model.model.register_forward_pre_hook(ends)
    with pytest.raises(error, match="2 GiB"):
        veneer.attach(model, virtual("prefix"))
