"""The compiled step: what the model's own forward gives, and to the bit the same in any company."""

import platform
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import veneer
from support.changed_logits import changed
from support.closeness import assert_no_further
from support.every_architecture import OFTEN, small, small_quantized
from support.random_adapters import ids
from support.serving_bases import write_adapters
from support.tiny_models import tiny
from veneer.generate.runners.choice import runner_for
from veneer.generate.runners.compiled import CompiledRunner
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.layer_table import Unsuited
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.kernels import decode, native
from veneer.kernels.cross_entropy import Logits
from veneer.quant.weight import QuantizedLinear
from veneer.serve.engine.adapter_cache import AdapterCache
from veneer.serve.engine.library import Library

pytestmark = pytest.mark.skipif(native.library_of("decode")[0] is None, reason="no C++ compiler")

MIX = {"plain": 0.6, "dora": -0.5, "wide": 0.3}
ROWS = ("plain", None, "wide", "dora", MIX, "pissa")


def rounded(architecture: str) -> PreTrainedModel:
    """Return the model in bfloat16, with the angles that it has there."""
    model = small(architecture, dtype=torch.bfloat16)
    model.load_state_dict(small(architecture).state_dict())
    return model


BASES: dict[str, Any] = {
    "float32": small,
    "bfloat16": rounded,
    "nf4": lambda architecture: small_quantized(architecture, 4, dtype=torch.float32),
    "int8": lambda architecture: small_quantized(architecture, 8, dtype=torch.float32),
    "capped": lambda architecture: changed(small(architecture), lambda z, _: Logits(0.7, 2.0)(z)),
}
# Between them they have all that structures can be made of.
VARIED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "falcon", "cohere2")
CASES = [
    *((architecture, "float32") for architecture in VARIED),
    *((VARIED[i], kind) for i, kind in enumerate(("nf4", "int8", "bfloat16", "capped"))),
    *(
        pytest.param(architecture, kind, marks=pytest.mark.slow)
        for architecture, kind in [
            *((each, "float32") for each in OFTEN if each not in VARIED),
            *((each, "nf4") for each in VARIED[1:]),
            *((each, "int8") for each in VARIED if each != VARIED[1]),
            *((each, "bfloat16") for each in VARIED[:2]),
            *((each, "capped") for each in VARIED[:3]),
        ]
    ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function of an architecture, whose adapters are written once."""
    return cache(lambda name: write_adapters(tmp_path_factory.mktemp(name), name, small))


@pytest.fixture
def homes(written, architecture):
    return dict(written(architecture))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def loaded(model: PreTrainedModel, homes: dict) -> list[LoadedAdapter | None]:
    """Return the adapter of each of ROWS."""
    library, cache = Library(homes), AdapterCache(model, 2**30)

    def load(which: Any) -> LoadedAdapter | None:
        weights = which if isinstance(which, dict) else {which: 1.0}
        mix = [(library.info(name), weight) for name, weight in weights.items() if name]
        return cache.get(tuple(mix)) if mix else None

    return [load(which) for which in ROWS]


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the same weights, computing in float64."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(*child.weight.shape[::-1], bias=child.bias is not None)
                linear.weight.data, linear.bias = child.weight.data, child.bias
                setattr(module, name, linear)
    return model.double()


def own_logits(model: PreTrainedModel, homes: dict, tokens: Tensor, *, force: bool) -> list[Tensor]:
    """Return what the model's own forward gives for each row under its adapter, float64."""
    for name, home in homes.items():
        veneer.load(model, home, name=name, force=force)
    rows = []
    for row, which in zip(tokens, ROWS, strict=True):
        veneer.use(model, which)
        with torch.no_grad():
            rows.append(model(row[None], use_cache=False).logits[0].double())
    return rows


@pytest.mark.parametrize(("architecture", "kind"), CASES)
@pytest.mark.thinned
def test_each_row_is_what_the_model_gives(architecture, homes, kind):
    make = BASES[kind]
    model, tokens = make(architecture), ids(len(ROWS), 19)
    runner = CompiledRunner(model, len(ROWS), 64)
    chunks = [
        Chunk(slot, row.tolist(), 0, adapter, logits=19)
        for slot, (row, adapter) in enumerate(zip(tokens, loaded(model, homes), strict=True))
    ]
    ours = runner.step(chunks).view(*tokens.shape, -1)
    own = own_logits(model, homes, tokens, force=kind != "float32")
    reference = own_logits(in_float64(make(architecture)), homes, tokens, force=True)
    for which, *logits in zip(ROWS, ours, own, reference, strict=True):
        assert_no_further(*logits, str(which))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("llama", kind) for kind in BASES), *((it, "bfloat16") for it in VARIED[3:])],
)
def test_the_same_to_the_bit_in_any_company(architecture, homes, kind, three_threads):
    model = BASES[kind](architecture)
    tokens = ids(len(ROWS), 37)
    adapters = loaded(model, homes)
    runner = CompiledRunner(model, len(ROWS), 64)

    def chunk(slot: int, first: int, last: int) -> Chunk:
        length = last - first
        row = tokens[slot, first:last].tolist()
        return Chunk(slot, row, first, adapters[slot], length, decoding=length == 1)

    together = runner.step([chunk(slot, 0, 37) for slot in range(len(ROWS))])
    together = together.view(*tokens.shape, -1)
    torch.set_num_threads(1)
    for slot in range(len(ROWS)):
        runner.free(slot)
    # One by one, in several chunks, and the last tokens one at a time beside other rows.
    logits: dict[int, list[Tensor]] = {slot: [] for slot in range(len(ROWS))}
    for slot in range(len(ROWS)):
        for first, last in ((0, 16), (16, 16 + slot), (16 + slot, 30)):
            if last > first:
                logits[slot].append(runner.step([chunk(slot, first, last)]))
    for at in range(30, 37):
        order = [*range(at % len(ROWS), len(ROWS)), *range(at % len(ROWS))]
        step = runner.step([chunk(slot, at, at + 1) for slot in order])
        for slot, row in zip(order, step.split(1), strict=True):
            logits[slot].append(row)
    for slot, rows in logits.items():
        assert torch.equal(torch.cat(rows), together[slot]), ROWS[slot]


@pytest.mark.parametrize(
    "tuning",
    [
        None,
        *(
            pytest.param(flags, marks=pytest.mark.slow, id=flags)
            for flags in ("-march=native -mtune=znver4", "-march=haswell -mtune=znver1")
        ),
    ],
)
def test_the_same_to_the_bit_by_any_threads(tuning, monkeypatch, tmp_path):
    """More threads than before, and parts of a group of queries for each, as compilers tune it."""
    if tuning is not None:
        if platform.machine() != "x86_64":
            pytest.skip("needs an x86 processor")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(native, "TUNINGS", (tuning.split(),))
        monkeypatch.setattr(decode, "library_of", native.library_of.__wrapped__)
    config = LlamaConfig(
        **{"hidden_size": 144, "intermediate_size": 77, "num_hidden_layers": 2, "head_dim": 24},
        **{"num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 99},
    )
    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(config), ids(1, 60)[0].tolist()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        runner = CompiledRunner(model, 1, 64)
        together = runner.step([Chunk(0, tokens, 0, None, 60)])
        runner.free(0)
        torch.set_num_threads(3)
        steps = [Chunk(0, tokens[:54], 0, None, 54)]
        steps += [Chunk(0, [tokens[at]], at, None, 1, decoding=True) for at in range(54, 60)]
        assert torch.equal(torch.cat([runner.step([step]) for step in steps]), together)
    finally:
        torch.set_num_threads(before)


def test_blocks_go_into_another_slot():
    runner = CompiledRunner(tiny("llama"), 2, 64)
    tokens = ids(1, 40)[0].tolist()
    expected = runner.step([Chunk(0, tokens, 0, None, 1)])
    runner.fill(1, [runner.block(0, 0, 16), runner.block(0, 16, 32)])
    assert torch.equal(runner.step([Chunk(1, tokens[32:], 32, None, 1)]), expected)


def test_a_row_may_outgrow_its_memory():
    model = tiny("llama")
    model.config.max_position_embeddings = 700
    runner = CompiledRunner(model, 1, 700)
    tokens = ids(1, 600)
    for first in range(0, 600, 150):
        row = tokens[0, first : first + 150].tolist()
        logits = runner.step([Chunk(0, row, first, None, 1)])
    with torch.no_grad():
        own = model(tokens, use_cache=False).logits[0, -1]
        reference = model.double()(tokens, use_cache=False).logits[0, -1]
    assert_no_further(logits[0], own, reference)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "bloom"])
def test_other_models_take_their_own_forward_and_a_notice_says_so(architecture):
    with pytest.raises(Unsuited, match="layers are not"):
        CompiledRunner(small(architecture), 2, 64)
    runner, notices = runner_for(small(architecture), 2, 64)
    assert isinstance(runner, GeneralRunner)
    assert "slower" in notices[0]


def test_a_layer_that_does_something_else_is_noticed():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Softplus()
    with pytest.raises(Unsuited, match="layers are not"):
        CompiledRunner(model, 2, 64)
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(Unsuited, match="something else"):
        CompiledRunner(model, 2, 64)
    model = changed(tiny("llama"), lambda logits, _: logits.clamp(-1, 1))
    with pytest.raises(Unsuited, match="more than multiply"):
        CompiledRunner(model, 2, 64)
