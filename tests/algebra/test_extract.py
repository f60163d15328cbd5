"""Extraction: a known change comes back, and what no adapter can hold is reported."""

import warnings

import peft
import pytest
import torch
from transformers import AutoTokenizer

import veneer
from support.adapter_states import add_to, assert_close, whole, written
from support.random_adapters import copy_of, logits, shake, tokenizer
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.algebra.extract import extract
from veneer.formats.adapters import write
from veneer.formats.capture import capture
from veneer.formats.install import install

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAYER = "model.layers.0.self_attn.q_proj"


def noise(model, *names: str, size: float = 0.02, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    return {name: size * torch.randn(weights[name].shape, generator=generator) for name in names}


def saved(tmp_path, change: dict[str, torch.Tensor], architecture: str = "llama"):
    """Write a base, and the base with a change; return their places."""
    base = tiny(architecture)
    places = written(base, tmp_path / "base"), tmp_path / "tuned"
    written(add_to(copy_of(base), change), places[1])
    return places


CHANGED = {
    "llama": LoRA(rank=3, targets="all"),
    "qwen2": LoRA(rank=3, targets="q_proj,lm_head"),  # a head of its own
    "gpt2": LoRA(rank=3, targets="all"),  # Conv1D, biases
    "minigpt": LoRA(rank=3, targets="attention"),
    "gpt_neox": LoRA(rank=3, targets="mlp", layers="1"),
}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((architecture, {"rank": 3}) for architecture in CHANGED),
        # How a rank is chosen concerns no architecture, but the way that a weight lies.
        *((each, by) for each in ("llama", "gpt2") for by in ({"rank": 99}, {"energy": 0.99999})),
    ],
    ids=str,
)
def test_a_known_change_of_low_rank_comes_back(architecture, settings, tmp_path):
    model, config = tiny(architecture), CHANGED[architecture]
    base = written(model, tmp_path / "base")
    veneer.attach(model, config, seed=0)
    shake(model, size=0.05)
    expected, changes = logits(model), whole(capture(model))
    tuned = written(veneer.merge(model), tmp_path / "tuned")
    extracted = extract(base, tuned, **settings)
    assert_close(whole(extracted.state), changes, 1e-5 if "rank" in settings else 5e-3)
    assert extracted.energy == pytest.approx(1.0, abs=1e-5)
    assert extracted.uncovered == ()
    assert extracted.uncovered_share == 0.0
    if settings != {"rank": 99}:
        assert {fit.rank for fit in extracted.layers} == {3}
    plain = veneer.load_base(base, dtype="float32")
    install(plain.model, extracted.state, tokenizer=plain.tokenizer)  # it knows its base
    if "rank" in settings:
        torch.testing.assert_close(logits(plain.model), expected, **CLOSE)
    for format in ("native", "peft"):
        write(extracted.state, tmp_path / format, format=format)
        again = veneer.load_base(base, dtype="float32").model
        veneer.load(again, tmp_path / format)
        assert torch.equal(logits(again), logits(plain.model))
    assert (tmp_path / "native" / "lora_config.json").is_file()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_change_of_full_rank_is_cut_to_its_main_directions(rank, tmp_path):
    names = [
        f"model.layers.{n}.{k}.weight" for n in (0, 1) for k in ("mlp.up_proj", "mlp.down_proj")
    ]
    change = noise(tiny("llama"), *names)
    extracted = extract(*saved(tmp_path, change), rank=rank)
    changes = whole(extracted.state)
    assert [fit.path for fit in extracted.layers] == list(changes)
    kept = total = 0.0
    for fit in extracted.layers:
        delta = change[f"{fit.path}.weight"].double()
        values = torch.linalg.svdvals(delta)
        assert fit.rank == rank
        assert fit.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert fit.energy == pytest.approx(
            float(values[:rank].norm() / values.norm()) ** 2, abs=1e-5
        )
        error = float((changes[fit.path] - delta).norm())
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-4)
        kept, total = kept + fit.energy * fit.norm**2, total + fit.norm**2
    assert extracted.energy == pytest.approx(kept / total)


def test_an_energy_gives_each_layer_the_rank_that_it_needs(tmp_path):
    flat, steep = f"{LAYER}.weight", "model.layers.1.self_attn.o_proj.weight"
    change = noise(tiny("llama"), flat)
    change[steep] = 0.1 * torch.outer(torch.linspace(-1, 1, 32), torch.ones(32))
    extracted = extract(*saved(tmp_path, change), energy=0.9)
    ranks = {fit.path: fit.rank for fit in extracted.layers}
    assert ranks["model.layers.1.self_attn.o_proj"] == 1
    assert 10 < ranks[LAYER] < 32
    assert all(fit.energy >= 0.9 for fit in extracted.layers)
    plain = tiny("llama")
    install(plain, extracted.state)
    assert {
        p: len(a) for p, a in ((k, x) for k, x in extracted.state.tensors.items()) if "lora_A" in p
    }
    assert extracted.state.config.rank_of(LAYER) == ranks[LAYER]
    assert extracted.state.config.scaling_of(LAYER) == 1.0


def test_what_is_no_linear_layer_is_uncovered_with_its_size(tmp_path):
    model = tiny("qwen2")
    names = (f"{LAYER}.weight", f"{LAYER}.bias", "model.norm.weight", "model.embed_tokens.weight")
    change = noise(model, *names)
    extracted = extract(*saved(tmp_path, change, "qwen2"), rank=4)
    assert [fit.path for fit in extracted.layers] == [LAYER]
    weights = dict(model.named_parameters())
    uncovered = {each.name: each for each in extracted.uncovered}
    assert set(uncovered) == set(names[1:])
    for name, each in uncovered.items():
        assert each.norm == pytest.approx(float(change[name].norm()), rel=1e-4)
        assert each.relative == pytest.approx(
            float(change[name].norm() / weights[name].detach().norm()), rel=1e-4
        )
    whole_change = sum(float(x.norm()) ** 2 for x in change.values())
    out = sum(float(change[name].norm()) ** 2 for name in names[1:])
    assert extracted.uncovered_share == pytest.approx(out / whole_change, rel=1e-4)
    assert (extracted.left_out, extracted.left_out_share) == (
        extracted.uncovered,
        extracted.uncovered_share,
    )
    size = sum(float(weight.detach().norm()) ** 2 for weight in weights.values())
    assert extracted.relative == pytest.approx((whole_change / size) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "paths"),
    [
        ("llama", {"model.embed_tokens", "lm_head"}),  # one weight
        ("qwen2", {"model.embed_tokens", "lm_head"}),  # two
        ("gpt2", {"transformer.wte", "lm_head", "transformer.wpe"}),
    ],
)
def test_embeddings_and_a_head_tied_to_them_can_be_taken_too(architecture, paths, tmp_path):
    model = tiny(architecture)
    names = [f"{p}.weight" for p in paths if f"{p}.weight" in dict(model.named_parameters())]
    change = {}
    for seed, (name, full) in enumerate(noise(model, *names, size=0.04).items()):
        directions = torch.randn(4, full.shape[1], generator=torch.Generator().manual_seed(seed))
        change[name] = full[:, :4] @ directions
    base, tuned = saved(tmp_path, change, architecture)
    if architecture == "qwen2":  # whose head is a linear layer like any other
        assert {fit.path for fit in extract(base, tuned, rank=4).layers} == {"lm_head"}
    else:
        with pytest.raises(veneer.AdapterError, match="nothing to extract"):
            extract(base, tuned, rank=4)
    extracted = extract(base, tuned, rank=4, embeddings=True)
    assert {fit.path for fit in extracted.layers} == paths
    assert extracted.uncovered == ()
    assert extracted.energy == pytest.approx(1.0, abs=1e-5)
    expected = logits(veneer.load_base(tuned, dtype="float32").model)
    assert float((expected - logits(model)).abs().max()) > 1e-2
    for format in ("native", "peft"):
        write(extracted.state, tmp_path / format, format=format)
        again = veneer.load_base(base, dtype="float32").model
        veneer.load(again, tmp_path / format)
        torch.testing.assert_close(logits(again), expected, **CLOSE)
    plain = veneer.load_base(base, dtype="float32").model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the two were one weight
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)


def test_the_targets_name_the_layers_that_changed_and_no_others(tmp_path):
    for n, (names, targets) in enumerate(
        [
            ((f"{LAYER}.weight",), (LAYER,)),
            (tuple(f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)), ("up_proj",)),
        ]
    ):
        place = tmp_path / str(n)
        assert (
            extract(*saved(place, noise(tiny("llama"), *names)), rank=2).state.config.targets
            == targets
        )


def test_a_base_of_a_wider_dtype_is_rounded_as_it_was_when_tuning_began(tmp_path):
    base = tiny("llama")
    place = written(base, tmp_path / "base")
    narrow = copy_of(base).to(torch.bfloat16)
    change = noise(base, f"{LAYER}.weight", size=0.05)
    tuned = written(add_to(narrow, change), tmp_path / "tuned")
    extracted = extract(place, tuned, rank=32)
    assert [fit.path for fit in extracted.layers] == [LAYER]
    assert extracted.uncovered == ()
    assert any("rounded" in notice for notice in extracted.notices)
    # The adapter over the rounded base is the tuned model.
    rounded = copy_of(base).to(torch.bfloat16).to(torch.float32)
    install(rounded, extracted.state)
    torch.testing.assert_close(logits(rounded), logits(narrow.to(torch.float32)), **CLOSE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "one of them"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, "at most 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(settings, says):
    with pytest.raises(veneer.ConfigError, match=says):
        extract("no/base", "no/tuned", **settings)


def test_models_that_are_no_kin_are_refused(tmp_path):
    base = written(tiny("llama"), tmp_path / "base")
    other = written(tiny("llama", seed=1), tmp_path / "other")
    with pytest.raises(veneer.AdapterError, match=r"trained apart.*no fine-tune"):
        extract(base, other, rank=2)
    assert extract(base, other, rank=2, force=True).relative > 1
    with pytest.raises(veneer.AdapterError, match="nothing to extract"):
        extract(base, base, rank=2)
    wider = written(tiny("qwen2"), tmp_path / "wider")
    with pytest.raises(
        veneer.ModelError, match=r"lm_head.weight is .* there and missing in the base"
    ):
        extract(base, wider, rank=2)


def test_other_settings_and_another_vocabulary_are_no_kin(tmp_path):
    change = noise(tiny("llama"), f"{LAYER}.weight")
    base, tuned = saved(tmp_path, change)
    heads = copy_of(tiny("llama"))
    heads.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    place = written(add_to(heads, change), tmp_path / "heads")
    AutoTokenizer.from_pretrained(tuned)  # the one that was written is readable
    with pytest.raises(veneer.AdapterError, match="settings of the two models differ"):
        extract(base, place, rank=2)
    other = tokenizer()
    altered = other.backend_tokenizer.to_str().replace('"A":', '"Ä":')
    (tuned / "tokenizer.json").write_text(altered, encoding="utf-8")
    with pytest.raises(veneer.AdapterError, match="vocabularies of the two models differ"):
        extract(base, tuned, rank=2)
    assert extract(base, tuned, rank=2, force=True).layers


def test_values_that_are_not_finite_are_refused(tmp_path):
    change = {f"{LAYER}.weight": torch.full((32, 32), float("nan"))}
    with pytest.raises(veneer.ModelError, match=r"q_proj.weight has values that are not finite"):
        extract(*saved(tmp_path, change), rank=2)
