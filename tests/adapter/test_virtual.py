"""Prefix and prompt: virtual tokens in front of every text, in plain calls and in generation."""

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

import veneer
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
from veneer.adapter.virtual import HOME, PrefixMLP
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.training.events import Trained

METHODS = ("prefix", "prompt")
COUNT = 5
COURSE = veneer.TrainConfig(steps=3, lr=0.05, warmup=0, tokens_per_step=40, tokens_per_batch=25)
each_method = pytest.mark.parametrize("method", METHODS)
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


def virtual(method: str, **options: Any) -> veneer.Method:
    return veneer.Method(method, **({"virtual_tokens": COUNT} | options))


def new_model(architecture: str, method: str, **options: Any) -> Any:
    return shake(veneer.attach(tiny(architecture), virtual(method, **options), seed=3))


def of_a_wide_window(model: Any) -> Any:
    """Let attention reach back to the first token, where it would not."""
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 64
    return model


def words_of(seed: int) -> Tensor:
    """Return the words that virtual tokens start from."""
    return torch.randint(VOCAB, (COUNT,), generator=torch.Generator().manual_seed(seed))


def behind(words: Tensor, text: Tensor) -> Tensor:
    return torch.cat([words.expand(len(text), -1), text], dim=1)


@each_method
@each_model
def test_fresh_tokens_say_what_the_words_that_they_start_from_would_say(architecture, method):
    model, text = tiny(architecture), ids()
    base = logits(model)
    wanted = logits(model, behind(words_of(3), text))[:, COUNT:]
    assert distance(wanted, base) > 0.01
    veneer.attach(model, virtual(method), seed=3)
    places = torch.arange(text.shape[1]).expand(len(text), -1)
    ones = torch.ones_like(text)
    embedded = model.get_input_embeddings()(text)
    ways: dict[str, dict[str, Any]] = {
        "plain": {"input_ids": text},
        "without a cache": {"input_ids": text, "use_cache": False},
        "mask": {"input_ids": text, "attention_mask": ones},
        "positions": {"input_ids": text, "position_ids": places, "use_cache": False},
        "one row of positions": {"input_ids": text, "position_ids": places[:1]},
        "both": {"input_ids": text, "attention_mask": ones.bool(), "position_ids": places},
        "embeddings": {"inputs_embeds": embedded, "use_cache": False},
    }
    with torch.no_grad():
        for way, given in ways.items():
            found = model(**given).logits
            assert found.shape == wanted.shape, way
            assert distance(found, wanted) < 1e-5, way
        by_place = model.get_decoder()(text).last_hidden_state
        assert by_place.shape[1] == text.shape[1]
    assert distance(model.get_output_embeddings()(by_place), wanted) < 1e-5


@pytest.mark.parametrize("options", [{}, {"position_ids": None}], ids=["positions", "none"])
@each_method
@each_model
def test_padding_is_not_seen(architecture, method, options):
    model = of_a_wide_window(new_model(architecture, method))
    long, short = ids(2, 11)[:1], ids(2, 7, seed=2)[:1]
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": places} | options
        found = model(torch.cat([long, left]), **given, use_cache=False).logits
    torch.testing.assert_close(found[:1], logits(model, long), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:, 4:], logits(model, short), rtol=1e-4, atol=1e-4)


def generated(model: Any, rows: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return eight new tokens of each row, greedily, and the logits they were chosen by."""
    longest = max(map(len, rows))
    padded = [torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows]
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    out = model.generate(
        torch.stack(padded),
        attention_mask=torch.tensor(masks),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, longest:], torch.stack(out.logits, dim=1)


@each_method
@each_model
def test_generation_with_a_cache_equals_recomputing_and_each_row_alone(architecture, method):
    model = of_a_wide_window(new_model(architecture, method))
    rows = [ids(1, 12)[0], ids(1, 5, seed=1)[0], ids(1, 9, seed=2)[0]]
    tokens, scores = generated(model, rows)
    again, recomputed = generated(model, rows, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, recomputed, rtol=1e-4, atol=1e-4)
    for i, row in enumerate(rows):
        alone, own = generated(model, [row])
        assert torch.equal(alone[0], tokens[i])
        torch.testing.assert_close(own[0], scores[i], rtol=1e-4, atol=1e-4)
        # Step by step without generation: the whole text at once.
        whole = logits(model, torch.cat([row, alone[0]])[None])[0, len(row) - 1 : -1]
        torch.testing.assert_close(own[0], whole, rtol=1e-4, atol=1e-4)
    veneer.use(model, None)
    assert not torch.allclose(generated(model, rows)[1], scores, atol=1e-2)


@each_method
def test_a_window_that_cuts_off_virtual_tokens(method):
    model = new_model("mistral", method)
    assert model.config.sliding_window < 12 + COUNT
    row = ids(1, 12)[0]
    tokens, scores = generated(model, [row])
    torch.testing.assert_close(generated(model, [row], use_cache=False)[1], scores)
    whole = logits(model, torch.cat([row, tokens[0]])[None])[0, len(row) - 1 : -1]
    torch.testing.assert_close(whole, scores[0], rtol=1e-4, atol=1e-4)
    wide = generated(of_a_wide_window(copy_of(model)), [row])[1]
    assert not torch.allclose(wide, scores, atol=1e-2)
    with pytest.raises(veneer.AdapterError, match="padded on the left to 17 places"):
        generated(model, [row, row[:5]])
    generated(model, [row, row.flip(0)])  # of one length


@each_method
def test_beams_keep_what_stands_in_front(method):
    model, rows = new_model("llama", method), [ids(1, 9)[0], ids(1, 6, seed=1)[0]]
    tokens = generated(model, rows, num_beams=3)[0]
    assert torch.equal(tokens, generated(model, rows, num_beams=3, use_cache=False)[0])


@pytest.mark.parametrize(
    "config",
    [virtual("prefix"), virtual("prefix", prefix_mlp=6), virtual("prompt")],
    ids=["prefix", "prefix by an MLP", "prompt"],
)
@each_model
def test_only_the_virtual_tokens_train_and_detaching_leaves_no_trace(architecture, config):
    model = tiny(architecture)
    before, marks, looks = snapshot(model), fingerprint(model), repr(model)
    said = logits(model)
    veneer.attach(model, config, seed=3)
    start = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
    assert start
    assert all(name.startswith(f"{HOME}.adapters.default.") for name in start)
    assert all(weight.dtype == torch.float32 for weight in start.values())
    (*_, last) = veneer.train(model, examples([12, 9, 15, 20, 7, 11]), COURSE)
    assert isinstance(last, Trained)
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], weight) for name, weight in start.items())
    assert base_parameters(model).keys() == {n for n in after if n not in start}
    assert fingerprint(model) == marks
    assert not torch.equal(logits(model), said)
    veneer.use(model, None)
    assert torch.equal(logits(model), said)
    veneer.detach(model)
    assert same(snapshot(model), before)
    assert repr(model) == looks
    assert torch.equal(logits(model), said)
    decoder = model.get_decoder()
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks


def test_one_of_several_acts(tmp_path):
    model = tiny("llama")
    said = {"none": logits(model)}
    veneer.attach(model, virtual("prefix"), name="a", seed=1)
    veneer.attach(model, virtual("prompt"), name="b", seed=2)
    veneer.attach(model, virtual("prefix", virtual_tokens=3), name="c", seed=3)
    shake(veneer.attach(model, veneer.LoRA(rank=2), name="l"))
    for name in "abcl":
        veneer.use(model, name)
        said[name] = logits(model)
        alone = copy_of(model)
        for other in set("abcl") - {name}:
            veneer.detach(alone, other)
        assert torch.equal(logits(alone), said[name])
    assert len({tuple(x.flatten().tolist()) for x in said.values()}) == 5
    for mix in ({"a": 0.5}, {"a": 1, "b": 1}, {"a": 1, "l": 1}, {"b": 2.0}):
        with pytest.raises(veneer.AdapterError, match="virtual tokens"):
            veneer.use(model, mix)
        assert veneer.in_use(model) == {"l": 1.0}
    veneer.use(model, {"b": 1.0})
    assert torch.equal(logits(model), said["b"])
    veneer.detach(model, "b")
    assert torch.equal(logits(model), said["none"])
    with pytest.raises(veneer.AdapterError, match="lie over it"):
        veneer.attach(veneer.detach(model, "l"), veneer.Method("full"))


def test_those_that_do_not_act_do_not_train():
    model = tiny("llama")
    veneer.attach(model, virtual("prompt"), name="a", seed=1)
    veneer.attach(model, virtual("prompt"), name="b", seed=2)
    for weight in getattr(model, HOME).parameters():
        weight.requires_grad_(True)
    before = {n: w.detach().clone() for n, w in getattr(model, HOME).named_parameters()}
    list(veneer.train(model, examples([12, 9]), COURSE))
    after = dict(getattr(model, HOME).named_parameters())
    changed = {n for n, w in before.items() if not torch.equal(after[n], w)}
    assert changed == {"adapters.b.embeddings"}


@each_method
def test_a_copy_is_a_model_of_its_own(method):
    model = new_model("llama", method)
    said, copy = logits(model), copy_of(model)
    assert torch.equal(logits(copy), said)
    with torch.no_grad():
        for weight in getattr(copy, HOME).parameters():
            weight.add_(1)
    assert not torch.equal(logits(copy), said)
    veneer.detach(copy)
    assert torch.equal(logits(copy), logits(tiny("llama")))
    assert torch.equal(logits(model), said)


@each_method
def test_merging_is_refused_while_they_act_and_leaves_them_out_otherwise(method):
    model = new_model("llama", method)
    with pytest.raises(veneer.AdapterError, match="virtual tokens"):
        veneer.merge(model)
    shake(veneer.attach(model, veneer.LoRA(rank=2), name="l"))
    said = logits(model)
    plain = veneer.merge(model)
    assert not hasattr(plain, HOME)
    assert plain.state_dict().keys() == tiny("llama").state_dict().keys()
    assert distance(logits(plain), said) < 1e-5
    assert not plain.get_decoder()._forward_pre_hooks
    veneer.use(model, "default")
    assert distance(logits(model), said) > 0.01


def test_a_text_to_start_from_is_repeated_or_cut():
    model, tokens = tiny("qwen2"), tokenizer()
    for text in ("ab c", "a much longer text"):
        words = torch.tensor((tokens(text, add_special_tokens=False)["input_ids"] * COUNT)[:COUNT])
        wanted = logits(model, behind(words, ids()))[:, COUNT:]
        veneer.attach(model, virtual("prompt", prompt_text=text), tokenizer=tokens)
        assert distance(logits(model), wanted) < 1e-5
        veneer.detach(model)


@each_method
def test_the_seed_decides_the_start(method):
    def start(seed: int | None) -> Tensor:
        (weight,) = getattr(
            veneer.attach(tiny("llama"), virtual(method), seed=seed), HOME
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
    first, second = getattr(model, HOME).adapters.values()
    assert not torch.equal(first(), second())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_an_mlp_makes_what_pefts_makes(architecture):
    part = getattr(new_model(architecture, "prefix", prefix_mlp=7), HOME).adapters["default"]
    assert isinstance(part, PrefixMLP)
    layers, _, heads, count, dim = part().shape
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
    values = [part.embeddings, part.W1, part.b1, part.W2, part.b2]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    wanted = theirs(torch.arange(count)).view(count, layers, 2, heads, dim)
    torch.testing.assert_close(part(), wanted.permute(1, 2, 3, 0, 4))


@each_method
def test_new_words_train_beside_them_and_are_saved(method, tmp_path):
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


@each_method
def test_over_a_packed_base_and_in_bf16(method):
    model = quantized("llama")
    wanted = logits(model, behind(words_of(3), ids()))[:, COUNT:]
    veneer.attach(model, virtual(method), seed=3)
    assert distance(logits(model), wanted) < 1e-5
    (*_, last) = veneer.train(model, examples([12, 9]), COURSE)
    assert isinstance(last, Trained)

    model = tiny("llama", dtype=torch.bfloat16)
    wanted = logits(model, behind(words_of(3), ids()))[:, COUNT:]
    veneer.attach(model, virtual(method), seed=3)
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), wanted.float()) < 0.02
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
def test_a_context_without_room(method):
    said = refused(tiny("gpt2"), virtual(method, virtual_tokens=63))
    assert "63 virtual tokens leave no room in the model's context of 64" in said
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


@each_method
def test_a_mask_of_scores_is_refused(method):
    model = new_model("llama", method)
    with pytest.raises(veneer.AdapterError, match="mask"):
        model(ids(), attention_mask=torch.zeros(2, 1, 12, 12))
