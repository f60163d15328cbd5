"""vLLM reads what Veneer writes, answers as Veneer does, and refuses what `veneer check --for vllm`
says that it refuses. It needs an environment of its own: make proof-vllm."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from support.random_adapters import ids, shake, tokenizer
from support.tiny_models import SHAPE, tiny, with_large_weights
from support.vllm import Reader, Vllm, available, forced
from veneer.formats.capture import capture
from veneer.formats.runtimes.check import check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not available(), reason="vLLM is not there; make proof-vllm sets it up"),
]
TEXTS = ("The capital of France is", "To boil an egg, you", "My favourite fruit is")
NEW = 12  # tokens of an answer
IN_A_BATCH = 4  # adapters
WIDER = {"bfloat16": torch.float32, "float32": torch.float64}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What check promises over a base whose class in vLLM adapts its embedding and head.
SERVED: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "q and v of rank 4": {"targets": "qv", "rank": 4},
    "k alone": {"targets": "k_proj"},
    "up alone": {"targets": "up_proj"},
    "mlp of rank 16": {"targets": "mlp", "rank": 16},
    "all": {"targets": "all", "alpha": 24},
    "all of rank 1": {"targets": "all", "rank": 1},
    "rslora": {"targets": "all", "rslora": True, "alpha": 8},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r".*\.1\..*": 5, "q_proj": 12},
        "alpha_pattern": {r".*\.0\..*": 1.5, "down_proj": 40},
    },
    "patterns of rslora": {
        "targets": "all",
        "rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"o_proj": 2},
    },
    "the last block": {"targets": "all", "layers": "-1"},
    "pissa": {"targets": "attention", "init": "pissa"},
    "olora": {"targets": "qv", "init": "olora"},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "head": {"targets": ["q_proj", "lm_head"]},
    "embedding and head": {"targets": ["embed_tokens", "lm_head"]},
}
RANKS = (1, 3, 16, 17, 48, 64, 100, 256, 320, 512)


@dataclass(frozen=True)
class Side:
    """A base of ours in the type that vLLM computes in and in a wider one, with adapters loaded,
    and vLLM over the same files."""

    ours: Any
    wide: Any
    vllm: Vllm
    adapters: Mapping[str, Path]
    prompts: list[list[int]]

    def answers_agree(self) -> str:
        """Let both go on from every prompt with every adapter, in one call, so that batches mix
        them, and without. Assert that vLLM is no further from the wider type than we are, times 2,
        that every adapter acts, and that its tokens are our likeliest but for ties."""
        asked = [(name, prompt) for prompt in self.prompts for name in self.adapters]
        alone = [(None, prompt) for prompt in self.prompts]
        given = self.vllm.answer(alone, new=NEW) + self.vllm.answer(asked, new=NEW)
        asked = [*alone, *asked]
        counted, ties = 0, []
        for name in (None, *self.adapters):
            rows = [
                (prompt, *answer)
                for (who, prompt), answer in zip(asked, given, strict=True)
                if who == name
            ]
            ours, wide = _says(self.ours, name, rows), _says(self.wide, name, rows)
            theirs = _theirs(rows, wide)
            noise = _rms(ours - wide, theirs)
            assert _rms(theirs - wide, theirs) <= 2 * noise, f"{name}: vLLM says something else"
            if name is not None:
                effect = _rms(_says(self.wide, None, rows) - wide, theirs)
                assert effect > 4 * noise, f"{name} changes too little to be judged"
            tokens = torch.tensor([tokens for _, tokens, _ in rows])
            likeliest = ours.argmax(-1)
            for row, at in (likeliest != tokens).nonzero().tolist():
                margin = abs(
                    float(wide[row, at, likeliest[row, at]] - wide[row, at, tokens[row, at]])
                )
                assert margin < 6 * noise, f"{name}: another token by {margin}, noise {noise}"
                ties.append(
                    f"{name}: {margin:.3g} apart, where rounding moves tokens by {noise:.3g}"
                )
            counted += tokens.numel()
        dtype = str(self.ours.dtype).removeprefix("torch.")
        first = (
            f"vLLM {self.vllm.version}, {dtype}: {counted} tokens of {len(self.adapters)} "
            f"adapters and the base, {len(ties)} of them others, at ties"
        )
        return "\n  ".join(("", first, *ties))


def _says(model: Any, name: str | None, rows: list[Any]) -> Tensor:
    veneer.use(model, name)
    return forced(model, [(prompt, tokens) for prompt, tokens, _ in rows]).double()


def _theirs(rows: list[Any], like: Tensor) -> Tensor:
    """Return vLLM's logarithms where it gave them, and NaN for all other tokens."""
    theirs = torch.full_like(like, float("nan"))
    for row, (_, _, steps) in enumerate(rows):
        for at, likeliest in enumerate(steps):
            theirs[row, at, list(likeliest)] = torch.tensor(list(likeliest.values())).double()
    return theirs


def _rms(difference: Tensor, theirs: Tensor) -> float:
    return float(difference[~theirs.isnan()].square().mean().sqrt())


def _side(
    base: Path, adapters: Mapping[str, Path], dtype: str, prompts: list[list[int]], **options: Any
) -> Side:
    ours, wide = (veneer.load_base(base, dtype=d).model for d in (dtype, "float32"))
    for name, place in adapters.items():
        for model in (ours, wide):
            veneer.load(model, place, name=name)
    wide.to(WIDER[dtype])
    vllm = Vllm(
        base,
        base.with_suffix(".log"),
        dtype=dtype,
        max_loras=IN_A_BATCH,
        max_cpu_loras=len(adapters) + 1,
        **options,
    )
    for name, place in adapters.items():
        assert check(place, "vllm").loads, name
        assert vllm.load(name, place) is None, name
    return Side(ours, wide, vllm, adapters, prompts)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, dict[str, Path], list[list[int]]]:
    """The base's directory, an adapter of each kind with values that change the answers, and
    prompts."""
    home = tmp_path_factory.mktemp("smollm2")
    base = veneer.load_base("smollm2-135m", dtype="float32")
    veneer.write_model(base.model, base.tokenizer, home / "base")
    adapters = {}
    for n, (name, options) in enumerate(SERVED.items()):
        size = 0.03 if options["targets"] in ("all", "mlp") else 0.06
        adapters[name] = _written(base.model, home / str(n), size=size, seed=n, **options)
    return home / "base", adapters, base.tokenizer(list(TEXTS))["input_ids"]


def _written(
    model: Any, place: Path, *, size: float = 0.1, seed: int = 0, keep: bool = False, **options: Any
) -> Path:
    veneer.attach(model, veneer.LoRA(**{"rank": 8} | options), seed=seed)
    veneer.save(shake(model, seed=seed, size=size), place, format="peft")
    if not keep:
        veneer.detach(model)
    return place


@pytest.fixture(scope="module", params=WIDER)
def side(request, smollm2) -> Iterator[Side]:
    made = _side(smollm2[0], smollm2[1], request.param, smollm2[2], max_lora_rank=16)
    yield made
    made.vllm.close()


def test_every_kind_that_check_promises_answers_there_as_here(side, capsys):
    said = side.answers_agree()
    with capsys.disabled():
        print(said)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tiny") / "base"
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = LlamaConfig(**SHAPE | heads)
    torch.manual_seed(0)
    veneer.write_model(with_large_weights(LlamaForCausalLM(config)), tokenizer(), place)
    return place


@pytest.fixture(scope="module")
def highest(tiny_base) -> Iterator[Side]:
    """A tiny base, for which vLLM takes the highest rank that it has a flag for."""
    model = veneer.load_base(tiny_base, dtype="float32").model
    adapters = {
        f"rank {rank}": _written(
            model, tiny_base.parent / str(rank), rank=rank, targets="all", size=rank**-0.25 / 4
        )
        for rank in RANKS
    }
    prompts = ids(2, 5).tolist()
    made = _side(tiny_base, adapters, "float32", prompts, max_lora_rank=512, max_model_len=64)
    yield made
    made.vllm.close()


def test_every_rank_answers_there_as_here(highest, capsys):
    said = highest.answers_agree()
    with capsys.disabled():
        print(said)


@pytest.mark.parametrize("slots", [3, 2])
def test_the_base_beside_adapters_needs_a_slot_that_is_free(slots, highest, tmp_path):
    """On processors vLLM takes the base for the last slot: its place in the list of slots is -1
    (vllm/lora/ops/torch_ops/lora_ops.py). Should the second case fail, docs/serving-elsewhere.md
    can say that this is mended."""
    names, prompts = ("rank 3", "rank 16"), highest.prompts
    base = highest.adapters["rank 3"].parent / "base"
    vllm = Vllm(base, tmp_path / "log", dtype="float32", max_loras=slots, max_model_len=64)
    for name in names:
        assert vllm.load(name, highest.adapters[name]) is None
    (alone,) = vllm.answer([(None, prompts[0])], new=NEW)
    beside, *_ = vllm.answer([(None, prompts[0]), *((name, prompts[1]) for name in names)], new=NEW)
    vllm.close()
    assert (beside[0] == alone[0]) == (slots > len(names))


@dataclass(frozen=True)
class Refused:
    """What vLLM refuses: how such an adapter is made, what check calls it, and vLLM's own words."""

    finding: str
    words: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[str, str] | None = None  # a part of each tensor's name


REFUSED = {
    "dora": Refused("use_dora", "does not yet support DoRA", options={"dora": True}),
    "a whole head": Refused(
        "modules_to_save", "only supports modules_to_save", config={"modules_to_save": ["lm_head"]}
    ),
    "biases": Refused("bias=all", "Adapter bias is not supported", config={"bias": "all"}),
    "lora_bias": Refused("lora_bias", r"LoRA bias \(lora_bias\)", config={"lora_bias": True}),
    "pissa by PEFT": Refused(
        "init_lora_weights=pissa",
        "does not support init_lora_weights='pissa'",
        config={"init_lora_weights": "pissa"},
    ),
    "aLoRA": Refused(
        "alora_invocation_tokens", "Activated LoRA", config={"alora_invocation_tokens": [3]}
    ),
    "replication": Refused(
        "layer_replication", "layer_replication", config={"layer_replication": [[0, 1]]}
    ),
    "blocks": Refused("use_bdlora", "BD-LoRA", config={"use_bdlora": {"nblocks": 2}}),
    "qalora": Refused("use_qalora", "QALoRA", config={"use_qalora": True}),
    "rank 600": Refused(
        "rank", "LoRA rank 600 is greater than max_lora_rank 512", options={"rank": 600}
    ),
    "new tokens": Refused(
        "key names",
        "unsupported LoRA weight",
        options={"targets": "embed_tokens"},
        renamed=("lora_embedding_A", "token_adapter.trainable_tokens_delta"),
    ),
    "another key": Refused(
        "key names", "unsupported LoRA weight", renamed=("lora_A.weight", "lora_A.default.weight")
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_check_says_is_refused_is_refused_for_that(name, highest, tiny_base, tmp_path):
    case = REFUSED[name]
    model = veneer.load_base(tiny_base, dtype="float32").model
    place = _written(model, tmp_path / "a", **{"targets": "qv", **case.options})
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | dict(case.config)))
    if case.renamed:
        tensors = load_file(place / WEIGHTS)
        save_file({key.replace(*case.renamed): t for key, t in tensors.items()}, place / WEIGHTS)
    refusals = {
        finding.what for finding in check(place, "vllm").findings if finding.verdict == "no"
    }
    assert case.finding in refusals
    refused = highest.vllm.load(name, place)
    assert refused is not None
    assert re.search(case.words, refused), refused


def test_no_adapter_acts_over_a_mixture_on_a_processor(tmp_path):
    veneer.write_model(tiny("qwen3_moe"), tokenizer(), tmp_path / "base")
    with pytest.raises(RuntimeError, match="triton"):
        Vllm(tmp_path / "base", tmp_path / "log", max_model_len=64)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method, highest, tiny_base, tmp_path):
    model = veneer.load_base(tiny_base, dtype="float32").model
    veneer.attach(model, veneer.Method(method, virtual_tokens=4))
    veneer.save(model, tmp_path / "a", format="peft")
    assert not check(tmp_path / "a", "vllm").loads
    refused = highest.vllm.load(method, tmp_path / "a")
    assert refused is not None
    assert "Missing required configuration fields" in refused


def test_a_head_of_classes_needs_a_base_that_is_served_as_a_classifier(
    highest, tiny_base, tmp_path
):
    model = veneer.load_base(tiny_base, dtype="float32").model
    place = _written(model, tmp_path / "a", targets="qv")
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    head = {"base_model.model.score.weight": torch.ones(2, 64)}
    save_file(load_file(place / WEIGHTS) | head, place / WEIGHTS)
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "modules_to_save")
    assert finding.verdict == "needs"
    refused = highest.vllm.load("score", place)
    assert refused is not None
    assert "does not expose a unique ClassificationHeadWithLoRA" in refused


def test_a_rank_above_the_limit_needs_the_flag_that_check_names(side, smollm2, tmp_path):
    model = veneer.load_base(smollm2[0], dtype="float32").model
    place = _written(model, tmp_path / "a", rank=17, targets="qv")
    (finding,) = (f for f in check(place, "vllm").findings if f.what == "rank")
    assert finding.do == "--max-lora-rank 32"
    refused = side.vllm.load("rank 17", place)
    assert refused is not None
    assert "LoRA rank 17 is greater than max_lora_rank 16" in refused


def test_a_limit_between_those_that_check_names_is_none(tiny_base):
    with pytest.raises(RuntimeError, match="max_lora_rank"):
        Vllm(tiny_base, tiny_base.with_suffix(".limit"), max_lora_rank=24, max_model_len=64)


@pytest.mark.parametrize(
    ("architecture", "its_class", "as_one"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", False),
        ("mixtral", "MixtralForCausalLM", False),
        ("gpt_oss", "GptOssForCausalLM", True),
    ],
)
def test_stacks_of_experts_are_read_as_they_were_written(architecture, its_class, as_one, tmp_path):
    """By vLLM's own reader, expert by expert. Its kernels for them need Triton, which its build for
    processors does not bring, so that no answers can be compared here."""
    model = tiny(architecture)
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"rank": 6, "alpha": 9, "targets": ["q_proj", *stacks], "rslora": True}
    options |= {"expert_rank": 3, "alpha_pattern": {r".*\.1\..*down_proj": 4}}
    place = _written(model, tmp_path / "a", keep=True, **options)
    state = capture(model)
    reader = Reader(tmp_path / "log")
    base = {"experts": 4, "architecture": its_class, "as_one": as_one}
    reader.do(experts=str(place), base=base, out=str(tmp_path / "deltas"))
    theirs = load_file(tmp_path / "deltas")
    reader.close()
    layers = [layer for layer in state.layers() if layer.kind == "parameter"]
    assert len(layers) == 4
    for layer in layers:
        owner, _, stack = layer.path.rpartition(".")
        scale = state.config.alpha_of(layer.path) / state.config.rank_of(layer.path) ** 0.5
        ours = scale * layer.B @ layer.A  # (experts, out, in)
        names = {"down_proj": ("down",), "gate_up_proj": ("gate_up",) if as_one else ("gate", "up")}
        read = torch.cat([theirs[f"{owner}.{name}"] for name in names[stack]], dim=1)
        torch.testing.assert_close(read, ours, rtol=1e-5, atol=1e-6 * float(ours.abs().max()))
