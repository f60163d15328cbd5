"""Law 11: what matches nothing is an error that names it; presets find what they mean."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    BloomConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import veneer
from support.random_adapters import targets_named
from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.layers import lora_layers
from veneer.adapter.report import report_targets
from veneer.adapter.targets import adaptable_layers, resolve

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
FUSED = {"query_key_value", "dense"}
WIDE = {"dense_h_to_4h", "dense_4h_to_h"}

# attention, qv, mlp, and what `all` has beyond them; each as the ends of paths within a block.
SETS: dict[str, tuple[set[str], set[str], set[str], set[str]]] = {
    **dict.fromkeys(
        ["llama", "qwen2", "qwen3", "mistral", "gemma"],
        (
            {f"self_attn.{name}" for name in QKVO},
            {"self_attn.q_proj", "self_attn.v_proj"},
            {f"mlp.{name}" for name in GATED},
            set(),
        ),
    ),
    "minigpt": (
        {f"attention.{name}" for name in QKVO},
        {"attention.q_proj", "attention.v_proj"},
        {"linear1", "linear2"},
        set(),
    ),
    "phi": (
        {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")},
        {"self_attn.q_proj", "self_attn.v_proj"},
        {"mlp.fc1", "mlp.fc2"},
        set(),
    ),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"attn.c_attn"}, {"mlp.c_fc", "mlp.c_proj"}, set()),
    "gpt_neox": (
        {f"attention.{name}" for name in FUSED},
        {"attention.query_key_value"},
        {f"mlp.{name}" for name in WIDE},
        set(),
    ),
    **dict.fromkeys(
        ["falcon", "bloom"],
        (
            {f"self_attention.{name}" for name in FUSED},
            {"self_attention.query_key_value"},
            {f"mlp.{name}" for name in WIDE},
            set(),
        ),
    ),
    "opt": (
        {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        {"self_attn.q_proj", "self_attn.v_proj"},
        {"fc1", "fc2"},
        {"model.decoder.project_in", "model.decoder.project_out"},
    ),
    **dict.fromkeys(
        ["bert", "bert, masked"],
        (
            {f"attention.{n}" for n in ("self.query", "self.key", "self.value", "output.dense")},
            {"attention.self.query", "attention.self.value"},
            {"intermediate.dense", "output.dense"},
            {"pooler.dense", "cls.predictions.transform.dense"},
        ),
    ),
    "t5": (
        {f"layer.0.SelfAttention.{n}" for n in "qkvo"}
        | {f"layer.1.EncDecAttention.{n}" for n in "qkvo"},
        {f"layer.0.SelfAttention.{n}" for n in "qv"}
        | {f"layer.1.EncDecAttention.{n}" for n in "qv"},
        {f"layer.{i}.DenseReluDense.{n}" for i in (1, 2) for n in ("wi", "wo")},
        set(),
    ),
    "mixtral": (
        {f"self_attn.{name}" for name in QKVO},
        {"self_attn.q_proj", "self_attn.v_proj"},
        {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        set(),
    ),
}


def model_of(name: str) -> nn.Module:
    if name in ARCHITECTURES:
        return tiny(name)
    if name == "bert":
        return BertModel(BertConfig(**SHAPE))
    if name == "bert, masked":
        return AutoModelForMaskedLM.from_config(BertConfig(**SHAPE))
    if name == "t5":
        config = T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
        return T5ForConditionalGeneration(config)
    config = {
        "opt": OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
        "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        "mixtral": MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=2),
    }[name]
    return AutoModelForCausalLM.from_config(config)


def paths(model: nn.Module, *targets: str, **options: object) -> set[str]:
    config = veneer.LoRA(targets=targets, **options)  # type: ignore[arg-type]
    return {layer.path for layer in resolve(model, config)}


def within_block(path: str) -> str:
    """Return what follows the number of the block."""
    return re.sub(r"^.*?\.\d+\.", "", path)


@pytest.mark.parametrize("name", SETS)
def test_presets(name):
    model = model_of(name)
    attention, qv, mlp, others = SETS[name]
    for preset, wanted in (("attention", attention), ("qv", qv), ("mlp", mlp)):
        if not wanted:
            with pytest.raises(veneer.TargetError, match=f"{preset!r} finds no such layers"):
                paths(model, preset)
            continue
        resolved = paths(model, preset)
        assert {within_block(path) for path in resolved} == wanted
        # Every block has its own.
        for end in wanted:
            many = [path for path in resolved if within_block(path) == end]
            blocks = sum(p.endswith(f".{end}") and within_block(p) == end for p in every(model))
            assert len(many) == blocks >= 2
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    stacks = {p for p in every(model) if ".experts." in p and not p.endswith("act_fn")}
    expected = {p for p in linear if model.get_submodule(p) is not head} | stacks
    assert paths(model, "all") == expected
    beyond = paths(model, "all") - paths(model, "attention")
    beyond -= paths(model, "mlp") if mlp else set()
    assert beyond <= others
    assert paths(model, "all", "attention", "qv") == paths(model, "all")


def every(model: nn.Module) -> list[str]:
    stacks = (path for path, weight in model.named_parameters() if weight.ndim == 3)
    return [*(path for path, _ in model.named_modules()), *stacks]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resolving_is_the_same_with_adapters_on(architecture):
    model = tiny(architecture)
    wanted = {t: paths(model, *targets_named(model, t)) for t in ("attention", "mlp", "everything")}
    lines = report_targets(model, veneer.LoRA(rank=3, targets="all"))
    veneer.attach(model, veneer.LoRA(rank=2, targets=targets_named(model, "everything")))
    for targets, resolved in wanted.items():
        assert paths(model, *targets_named(tiny(architecture), targets)) == resolved
    assert {path for path, _ in lora_layers(model)} == wanted["everything"]
    assert report_targets(model, veneer.LoRA(rank=3, targets="all")) == lines


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_reported_is_what_trains(architecture):
    config = veneer.LoRA(
        rank=3,
        targets=targets_named(tiny(architecture), "everything"),
        rank_pattern={r".*\.1\..*": 5},
    )
    with torch.device("meta"):
        report = report_targets(model_of_meta(architecture), config)
    model = veneer.attach(tiny(architecture), config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert report.trained == trained
    assert report.base_parameters == sum(w.numel() for w in tiny(architecture).parameters())
    assert report.share == trained / report.base_parameters
    for line in report.lines:
        layer = model.get_submodule(line.path)
        assert (line.out, line.in_) in (
            layer.dense_base_weight.shape,
            layer.dense_base_weight.T.shape,
        )
        own = sum(weight.numel() for weight in layer.adapters.parameters())
        assert line.trained == own == line.rank * (line.out + line.in_)


def model_of_meta(architecture: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(tiny(architecture).config)


# Names, ends, paths and patterns.


def test_names_ends_paths_and_patterns():
    model = tiny("llama")
    one = "model.layers.1.mlp.up_proj"
    assert paths(model, "up_proj") == {one, one.replace("1", "0")}
    assert paths(model, "mlp.up_proj") == paths(model, "up_proj")
    assert paths(model, one) == paths(model, "layers.1.mlp.up_proj") == {one}
    assert paths(model, r"re:\.1\.mlp\.(up|down)") == {one, one.replace("up", "down")}
    assert paths(model, "re:up_proj$", "lm_head") == {*paths(model, "up_proj"), "lm_head"}
    assert paths(model, "embed_tokens") == {"model.embed_tokens"}
    assert veneer.LoRA(targets="q_proj, v_proj").targets == ("q_proj", "v_proj")
    assert veneer.LoRA(targets="re:q{1,2}_proj").targets == ("re:q{1,2}_proj",)
    with pytest.raises(veneer.TargetError, match="'proj' matches no layer"):
        paths(model, "proj")


@given(data=st.data())
def test_the_end_of_any_path_finds_it(data):
    model = tiny("gpt2")
    layer = data.draw(st.sampled_from(adaptable_layers(model)))
    names = layer.path.split(".")
    end = ".".join(names[data.draw(st.integers(0, len(names) - 1)) :])
    resolved = paths(model, end)
    assert layer.path in resolved
    assert all(path == end or path.endswith(f".{end}") for path in resolved)


def test_every_miss_is_named_at_once_with_the_nearest_name():
    model = tiny("llama")
    config = veneer.LoRA(
        targets=["q_proj", "q_prj", "atention", "self_attn", "re:nowhere", "re:(", "xyzzy"],
        layers="0:1,7,x",
        rank_pattern={"v_proj": 3},
        alpha_pattern={"q_porj": 3},
    )
    with pytest.raises(veneer.TargetError) as caught:
        resolve(model, config)
    message = str(caught.value)
    for problem in (
        "'q_prj' matches no layer; did you mean 'q_proj'?",
        "'atention' matches no layer; did you mean 'attention'?",
        "'self_attn' is a LlamaAttention, but only linear layers",
        "'re:nowhere' matches no layer",
        "'re:(' is no regular expression",
        "'xyzzy' matches no layer;",
        "layers has '7', but the model has blocks 0 to 1",
        "layers has 'x', but takes slices",
        "the pattern 'v_proj' matches none of the targets",
        "the pattern 'q_porj' matches none of the targets; did you mean 'q_proj'?",
    ):
        assert problem.rstrip(";") in message
    assert "'q_proj' matches no layer" not in message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_miss_in_any_architecture(architecture):
    model = tiny(architecture)
    name = sorted(paths(model, "all"))[0].rpartition(".")[2]
    with pytest.raises(veneer.TargetError, match=f"did you mean '{name}'"):
        paths(model, "all", name[:-1] + "x" if len(name) > 3 else name + "x")


DEEP = AutoModelForCausalLM.from_config(
    MixtralConfig(**SHAPE | {"num_hidden_layers": 6}, num_key_value_heads=2, num_local_experts=2)
)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0:3", [0, 1, 2]),
        ("-2:", [4, 5]),
        (":2", [0, 1]),
        (":", [0, 1, 2, 3, 4, 5]),
        ("3", [3]),
        ("-1", [5]),
        ("-6", [0]),
        ("0, 2 ,5", [0, 2, 5]),
        ("0:2,4:", [0, 1, 4, 5]),
        ("1:-1", [1, 2, 3, 4]),
        ("4:99", [4, 5]),
        ("0,0:1", [0]),
    ],
)
def test_ranges_of_layers(text, blocks):
    resolved = {int(path.split(".")[2]) for path in paths(DEEP, "q_proj", layers=text)}
    assert sorted(resolved) == blocks


@pytest.mark.parametrize("text", ["6", "-7", "3:3", "9:", "", ",", "a", "1:2:3", "1-2", "-", "1 2"])
def test_ranges_that_name_nothing(text):
    with pytest.raises(veneer.TargetError, match="layers"):
        paths(DEEP, "q_proj", layers=text)


def test_ranges_leave_out_what_stands_in_no_block():
    model = tiny("llama")
    resolved = paths(model, "attention", "embed_tokens", "lm_head", layers="0")
    assert resolved == {path for path in paths(model, "attention") if ".0." in path}
    with pytest.raises(veneer.TargetError, match="leaves none of the targets"):
        paths(model, "lm_head", layers="0")


def test_ranks_and_alphas_of_single_layers():
    config = veneer.LoRA(
        rank=4,
        alpha=6,
        targets="all",
        rank_pattern={"layers.0.mlp.up_proj": 7, "up_proj": 2, r".*\.1\.self_attn\..*": 3},
        alpha_pattern={"[qk]_proj": 1.5, "q_proj": 9},
    )
    model = veneer.attach(tiny("llama"), config)
    for path, layer in lora_layers(model):
        adapter = layer.adapters["default"]
        rank = (
            7
            if path.endswith("0.mlp.up_proj")
            else 2
            if path.endswith("up_proj")
            else 3
            if "1.self_attn" in path
            else 4
        )
        alpha = 1.5 if path.endswith(("q_proj", "k_proj")) else 6
        assert adapter.rank == config.rank_of(path) == rank, path
        assert config.alpha_of(path) == alpha
        assert adapter.scaling == config.scaling_of(path) == alpha / rank


def test_a_pattern_matches_the_end_of_a_path():
    config = veneer.LoRA(rank=1, rank_pattern={"proj": 2, "b": 3, "a.c": 4, ".*d": 5})
    for path, rank in {
        "x.proj": 2,
        "x.q_proj": 1,
        "proj": 2,
        "x.b": 3,
        "b.x": 1,
        "x.a.c": 4,
        "za.c": 1,
        "x.zd": 5,
    }.items():
        assert config.rank_of(path) == rank, path
