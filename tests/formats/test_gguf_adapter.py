"""Law 5, for llama.cpp's LoRA files: llama.cpp computes with them what we do, and we read them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from support.closeness import assert_same_logits
from support.llama_cpp import LlamaCpp
from support.random_adapters import distance, ids, logits, same, shake, snapshot, with_new_tokens
from support.random_adapters import tokenizer as characters
from support.tiny_gguf import CONFIGS, VOCAB, random_model, write_model
from support.tiny_models import tiny
from veneer.adapter.layers import lora_layers
from veneer.errors import AdapterError
from veneer.formats.capture import capture
from veneer.formats.gguf import adapter as store
from veneer.formats.gguf import mapping
from veneer.formats.install import install

TIED = {name for name, (_, config) in CONFIGS.items() if config.tie_word_embeddings}
PATTERNS = {
    "rank": 4,
    "alpha": 6,
    "targets": "all",
    "rslora": True,
    "rank_pattern": {r"layers?\.1\..*|h\.1\..*": 2},
    "alpha_pattern": {"q_proj|qkv_proj|c_attn": 3, "down_proj|dense|c_proj": 11.5},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 3, "targets": "all"},
    "rsLoRA with patterns": PATTERNS,
    "a start of its own": {"rank": 2, "alpha": 3, "targets": "attention", "init": "olora"},
    "embedding": {"rank": 4, "alpha": 6, "targets": "embedding"},
    "head": {"rank": 4, "alpha": 6, "targets": "lm_head"},
}


HALF = 2 * torch.finfo(torch.float16).eps  # of the norm of log probabilities


def adapted(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    if options["targets"] == "embedding":
        embedding = model.get_input_embeddings()
        path = next(path for path, module in model.named_modules() if module is embedding)
        options = options | {"targets": [path.rpartition(".")[2]]}
    return shake(veneer.attach(model, veneer.LoRA(**options)), size=0.2)


def cases(name: str) -> list[str]:
    return [case for case in ADAPTERS if name not in TIED or case not in ("embedding", "head")]


def last(model: PreTrainedModel) -> Tensor:
    return logits(model, ids(2, 9))[:, -1].log_softmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.thinned(one_in=2)
def test_llama_cpp_computes_what_we_do(name, tmp_path):
    base = random_model(name)
    expected, files = {}, {}
    for case in cases(name):
        model = adapted(copy.deepcopy(base), **ADAPTERS[case])
        files[case] = tmp_path / f"{case}.gguf"
        store.write(capture(model), files[case], base.config)
        veneer.use(model, {"default": 0.5})
        half = last(model)
        veneer.use(model, "default")
        expected[case] = (last(model), half)
    place = write_model(name, base, tmp_path / "base.gguf")
    server = LlamaCpp(place, list(files.values()), exact=True)
    listed = server.ask("/lora-adapters")
    assert [adapter["path"] for adapter in listed] == list(map(str, files.values()))
    tokens = ids(2, 9)
    plain = last(base)
    # llama.cpp has tables of half precision for GELU and the exponential.
    off = distance(server.next_token(tokens, VOCAB), plain)
    assert off < HALF
    for case, (whole, half) in expected.items():
        for scale, ours in ((1.0, whole), (0.5, half)):
            theirs = server.next_token(tokens, VOCAB, {files[case]: scale})
            assert distance(theirs, ours) < HALF + 2 * off, (case, scale)
            assert distance(ours, plain) > 0.03, (case, scale)
        assert distance(whole, half) > 0.03, case


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_back(name, every, tmp_path):
    """Of each architecture two adapters, and all among the slow proofs."""
    base = random_model(name)
    turn = [*CONFIGS].index(name)
    for case in cases(name) if every else (2 * cases(name))[turn % 3 : turn % 3 + 2]:
        model = adapted(copy.deepcopy(base), **ADAPTERS[case])
        state, file = capture(model), tmp_path / "adapter.gguf"
        notes = store.write(state, file, base.config)
        assert bool(notes) == (case in ("rsLoRA with patterns", "a start of its own"))
        again = store.read(file, base.config)
        assert again.base_fingerprint == state.base_fingerprint
        fresh = copy.deepcopy(base)
        install(fresh, again)
        assert_same_logits(logits(fresh), model, logits)
        if not notes:
            assert same(again.tensors, state.tensors)
            assert again.config.targets == state.config.targets


def test_llama_cpp_acts_from_the_invocation_on(tmp_path):
    """In its server: from the last occurrence on, and in a prompt without one not at all."""
    base, tokens = random_model("llama"), ids(2, 9)
    assert tokens[0, 4:6].tolist() not in tokens[1].unfold(0, 2, 1).tolist()
    tokens[0, 1:3] = tokens[0, 4:6]
    invocation = tokens[0, 4:6].tolist()
    model = adapted(copy.deepcopy(base), rank=4, targets="all", invocation=invocation)
    state, file = capture(model), tmp_path / "adapter.gguf"
    store.write(state, file, base.config)
    assert store.read(file, base.config).config.invocation == tuple(invocation)
    server = LlamaCpp(write_model("llama", base, tmp_path / "base.gguf"), [file], exact=True)
    assert server.ask("/lora-adapters")[0]["alora_invocation_tokens"] == invocation
    plain, ours = last(base), last(model)
    off = distance(server.next_token(tokens, VOCAB), plain)
    theirs = server.next_token(tokens, VOCAB, {file: 1.0})
    assert distance(theirs, ours) < HALF + 2 * off
    assert distance(ours[0], plain[0]) > 0.03
    assert torch.equal(ours[1], plain[1])


def contents(model: PreTrainedModel) -> mapping.Contents:
    return mapping.contents_of(capture(model), store.naming_of(model.config))


def test_one_alpha_gives_most_layers_their_scaling_and_b_the_rest():
    model = adapted(random_model("llama"), **PATTERNS)
    file = contents(model)
    for layer in capture(model).layers():
        name = store.naming_of(model.config).places[layer.path].name
        A, B = (
            file.tensors[name + end].astype(np.float64) for end in (mapping.A_END, mapping.B_END)
        )
        scaling = capture(model).config.scaling_of(layer.path)
        theirs = file.alpha / B.shape[1] * (B @ A)  # as llama.cpp does
        ours = scaling * (layer.B.double() @ layer.A.double()).numpy()
        if not name.endswith(("attn_q.weight", "attn_k.weight")):
            assert np.linalg.norm(theirs - ours) < 1e-6 * np.linalg.norm(ours)
        assert np.linalg.norm(theirs) == pytest.approx(np.linalg.norm(ours), rel=1e-6)
    assert "folded into their B" in file.notes[0]


def test_an_alpha_of_zero_means_no_scaling_as_in_llama_cpp():
    model = adapted(random_model("llama"), rank=4, targets="all", rank_pattern={"q_proj": 2})
    naming, made = store.naming_of(model.config), contents(model)
    again = mapping.state_of(mapping.Contents(made.architecture, 0.0, made.tensors), naming)
    assert {again.config.scaling_of(layer.path) for layer in again.layers()} == {1.0}


def test_sixteen_bits_halve_the_file_and_say_when_they_cannot_hold_a_value(tmp_path):
    model = adapted(random_model("llama"), rank=8, targets="all")
    state = capture(model)
    long, short = tmp_path / "long.gguf", tmp_path / "short.gguf"
    store.write(state, long, model.config)
    store.write(state, short, model.config, dtype="float16")
    assert short.stat().st_size < 0.7 * long.stat().st_size
    fresh = random_model("llama")
    install(fresh, store.read(short, model.config))
    assert 0 < distance(logits(fresh), logits(model)) < 1e-2
    path = next(key for key in state.tensors if key.endswith("lora_A"))
    state.tensors[path][0, 0] = 1e6
    with pytest.raises(AdapterError, match="float16 cannot hold"):
        store.write(state, tmp_path / "no.gguf", model.config, dtype="float16")
    assert not (tmp_path / "no.gguf").exists()


# DoRA.


def test_dora_is_refused_and_approximated_on_request(tmp_path):
    base = random_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    characters().save_pretrained(tmp_path / "base")
    loaded = veneer.load_base(tmp_path / "base", dtype="float32").model
    model = shake(veneer.attach(loaded, veneer.LoRA(rank=8, targets="all", dora=True)))
    file = tmp_path / "adapter.gguf"
    with pytest.raises(AdapterError, match=r"merge it into the model.*approximate"):
        store.write(capture(model), file, model.config)
    assert not file.exists()
    (note,) = store.write(capture(model), file, model.config, approximate=True)
    missing = float(note.partition(":")[2].partition("%")[0]) / 100
    fresh = copy.deepcopy(base)
    install(fresh, store.read(file, model.config))
    lost = whole = 0.0
    for (_, ours), (_, theirs) in zip(lora_layers(model), lora_layers(fresh), strict=True):
        lost += float((ours.delta() - theirs.delta()).square().sum())
        whole += float(ours.delta().square().sum())
    assert missing == pytest.approx((lost / whole) ** 0.5, abs=1e-3)
    assert 0.01 < missing < 0.9


def test_the_nearest_lora_is_the_best_of_its_rank():
    model = shake(veneer.attach(random_model("llama"), veneer.LoRA(rank=4, dora=True)))
    state = capture(model)
    plain, _ = mapping.without_dora(state, lambda path: model.get_submodule(path).dense_base_weight)
    for path, layer in lora_layers(model):
        change = layer.delta().double()
        near = plain.config.scaling_of(path) * (
            plain.tensors[f"{path}.lora_B"].double() @ plain.tensors[f"{path}.lora_A"].double()
        )
        best = torch.linalg.svdvals(change)[4:].square().sum().sqrt()
        assert float((change - near).norm()) == pytest.approx(float(best), rel=1e-3)


# Refusals.

NOT_WRITTEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions": ("gpt2", {"targets": ["wpe", "c_fc"]}, "llama.cpp adapts no transformer.wpe"),
    "tied embedding": (
        "llama",
        {"targets": ["embed_tokens"]},
        "embed_tokens is embedding and head",
    ),
    "tied head": ("llama", {"targets": ["lm_head"]}, "lm_head is embedding and head"),
    "no such architecture": ("gpt_neox", {"targets": "all"}, "not for gpt_neox"),
    "minigpt": ("minigpt", {"targets": "all"}, "not for minigpt"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_the_format_cannot_express_is_refused_by_name(case, tmp_path):
    architecture, options, expected = NOT_WRITTEN[case]
    model = shake(veneer.attach(tiny(architecture), veneer.LoRA(**options)))
    with pytest.raises(AdapterError, match=expected):
        store.write(capture(model), tmp_path / "adapter.gguf", model.config)
    assert not (tmp_path / "adapter.gguf").exists()


def test_new_tokens_and_dora_are_refused_together(tmp_path):
    model = tiny("llama")
    with_new_tokens(model, characters())
    veneer.attach(model, veneer.LoRA(dora=True))
    with pytest.raises(AdapterError, match=r"DoRA.*no place for new tokens"):
        store.write(capture(model), tmp_path / "adapter.gguf", tiny("llama").config)


@pytest.mark.parametrize("method", ["prefix", "prompt", "freeze"])
def test_other_methods_are_refused(method, tmp_path):
    model = tiny("llama")
    veneer.attach(model, veneer.Method(method))
    with pytest.raises(AdapterError, match=method):
        store.write(capture(model), tmp_path / "adapter.gguf", model.config)


@pytest.fixture
def written(tmp_path) -> tuple[Path, PreTrainedModel]:
    model = adapted(random_model("llama"), rank=3, targets="all")
    store.write(capture(model), tmp_path / "adapter.gguf", model.config)
    return tmp_path / "adapter.gguf", model


def edited(contents: mapping.Contents, change: Callable[[dict[str, np.ndarray]], None]) -> Any:
    tensors = dict(contents.tensors)
    change(tensors)
    return mapping.Contents(contents.architecture, contents.alpha, tensors)


Q = "blk.0.attn_q.weight"
NOT_READ: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "half": (lambda t: t.pop(f"{Q}.lora_b"), "lora_a alone, without its other half"),
    "norm": (lambda t: t.update({"blk.0.attn_norm.weight": np.ones(3)}), "attn_norm.weight"),
    "unknown": (
        lambda t: t.update({"blk.7.attn_q.weight.lora_a": np.ones((2, 2))}),
        "no 'blk.7.attn_q.weight' to adapt; did you mean",
    ),
    "vector": (lambda t: t.update({f"{Q}.lora_a": np.ones(3)}), "no matrix"),
    "rows": (lambda t: t.update({f"{Q}.lora_b": np.ones((7, 3))}), "7 rows"),
    "nothing": (lambda t: t.clear(), "adapts nothing"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_tensors_that_do_not_belong_are_named(case):
    model = adapted(random_model("llama"), rank=3, targets="all")
    change, expected = NOT_READ[case]
    with pytest.raises(AdapterError, match=expected):
        mapping.state_of(edited(contents(model), change), store.naming_of(model.config))


def test_a_misshapen_tensor_is_refused_on_laying_it_over(tmp_path, written):
    file, model = written
    state = store.read(file, model.config)
    state.tensors["model.layers.0.self_attn.v_proj.lora_A"] = torch.zeros(3, 5)
    base = random_model("llama")
    before = snapshot(base)
    with pytest.raises(AdapterError, match="v_proj has A"):
        install(base, state)
    assert same(before, snapshot(base))


def test_an_adapter_of_another_base_or_architecture_is_refused(written):
    file, _ = written
    state = store.read(file, CONFIGS["llama"][1])
    with pytest.raises(AdapterError, match="another base"):
        install(random_model("llama", seed=3), state)
    with pytest.raises(AdapterError, match=r"adapter\.gguf.*'llama'.*'qwen2'"):
        store.read(file, CONFIGS["qwen2"][1])


def with_settings(path: Path, **settings: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **settings}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    writer.add_tensor(f"{Q}.lora_a", np.ones((2, 64), np.float32))
    writer.add_tensor(f"{Q}.lora_b", np.ones((64, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"general.type": "model"}, "general.type is 'model'"),
        ({"adapter.type": "control_vector"}, "adapter.type is 'control_vector'"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, "is no list of UINT32"),
        ({"adapter.lora.alpha": "much"}, "alpha is 'much'"),
        ({"adapter.lora.alpha": float("nan")}, "alpha is nan"),
        ({"adapter.lora.alpha": -1.0}, "alpha is -1"),
    ],
    ids=str,
)
def test_settings_that_are_not_read_are_named(settings, expected, tmp_path):
    file = with_settings(tmp_path / "adapter.gguf", **settings)
    with pytest.raises(AdapterError, match=rf"adapter\.gguf.*{expected}"):
        store.read(file, CONFIGS["llama"][1])


def test_without_an_alpha_llama_cpp_does_not_scale(tmp_path):
    state = store.read(with_settings(tmp_path / "adapter.gguf"), CONFIGS["llama"][1])
    assert state.config.scaling_of("model.layers.0.self_attn.q_proj") == 1.0


def test_an_adapter_is_detected_by_its_content(written, tmp_path):
    file, _ = written
    assert store.detects(file)
    assert store.detects(file.rename(tmp_path / "without_a_name"))
    assert not store.detects(tmp_path)
    assert not store.detects(tmp_path / "absent")
    place = write_model("llama", random_model("llama"), tmp_path / "model.gguf")
    assert not store.detects(place)
    (tmp_path / "garbage").write_bytes(b"GGUF" + bytes(range(200)))
    assert not store.detects(tmp_path / "garbage")


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("where", ["count", "string", "array", "dims"])
def test_lengths_that_lie_end_at_once(length, where, tmp_path, written):
    file, model = written
    data = bytearray(file.read_bytes())
    long = length.to_bytes(8, "little")
    if where == "array":
        file = with_settings(tmp_path / "listed.gguf", some=[1, 2, 3])
        data = bytearray(file.read_bytes())
        at = data.index(b"some") + 4 + 4 + 4
    else:
        name = data.index(b"blk.0.")
        places = {"count": 8, "string": 24, "dims": data.index(b"lora_a", name) + 6 + 4}
        at = places[where]
    data[at : at + 8] = long
    file.write_bytes(bytes(data))
    with pytest.raises(AdapterError):
        store.read(file, model.config)
