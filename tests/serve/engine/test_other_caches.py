"""Models that are other than usual: rows with adapters of their own equal separate runs over latent
attention, which gives its layers what it has cached; what no rows can be served of is refused."""

from dataclasses import replace

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.every_architecture import small, small_config
from support.random_adapters import shake
from veneer.adapter.layers import lora_layers
from veneer.errors import AdapterError, ModelError
from veneer.formats.capture import capture
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.kernels.graphs import Graphs
from veneer.serve.engine.adapter_cache import Fit
from veneer.serve.engine.library import Entry
from veneer.serve.engine.request import EngineConfig

PROMPT, NEXT = tuple(range(3, 15)), 5
RUNNERS = {
    "general": lambda model: GeneralRunner(model, 2),
    "slots": lambda model: SlotRunner(model, 2, 64, Graphs(None)),
}


@pytest.mark.parametrize(
    "architecture",
    ["deepseek_v2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("deepseek_v3", "youtu"))],
)
@pytest.mark.parametrize("runner", RUNNERS)
@torch.no_grad()
def test_rows_with_adapters_of_their_own_equal_separate_runs(architecture, runner):
    model = veneer.attach(small(architecture), veneer.LoRA(rank=2, targets="all"))
    model = shake(model, size=0.1).requires_grad_(False).eval()
    mix = [("default", 1.0)]
    layers = {
        layer: layer.low_rank_update(layer.named(mix), torch.float32)
        for _, layer in lora_layers(model)
    }
    adapter = LoadedAdapter("default", layers, 0, ("default",))
    tokens, own, exact = torch.tensor([[*PROMPT, NEXT]]), [], []
    rows = RUNNERS[runner](model)
    for slot, each in enumerate((adapter, None)):
        veneer.use(model, "default" if each else None)
        own.append(model(tokens, use_cache=False).logits[0, -1])
        veneer.use(model, None)
        rows.step([Chunk(slot, PROMPT, 0, each, 1)])
    is_late = isinstance(rows, SlotRunner)
    if is_late:
        rows.take([0, 1], torch.tensor([NEXT, NEXT]))
    token, at = -1 if is_late else NEXT, len(PROMPT)
    logits = rows.step(
        [Chunk(s, (token,), at, a, 1, decoding=True) for s, a in enumerate((adapter, None))]
    )
    model.double().set_experts_implementation("eager")  # float64 has no grouped products
    for which in ("default", None):
        veneer.use(model, which)
        exact.append(model(tokens, use_cache=False).logits[0, -1])
        veneer.use(model, None)
    assert not torch.equal(own[0], own[1])
    assert_no_further(logits, torch.stack(own), torch.stack(exact))


# Of an index beside keys and values, and of more tokens than a prompt has.
@pytest.mark.parametrize("architecture", ["deepseek_v32", "cpmant"])
def test_a_cache_of_another_kind_is_refused(architecture):
    with pytest.raises(ModelError, match="keep keys and values"):
        GeneralRunner(small(architecture), 2)


# Of encoders, whose tokens see those behind them, and of code that takes no second chunk.
@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("bert", "an encoder"),
        ("xlm", "code raises AssertionError"),
        *(
            pytest.param(name, why, marks=pytest.mark.slow)
            for name, why in {
                **dict.fromkeys(("electra", "camembert", "roc_bert", "xmod"), "an encoder"),
                "prophetnet": "code raises AssertionError",
            }.items()
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_that_cannot_be_read_in_chunks_is_refused(architecture, why, dtype):
    with pytest.raises(ModelError, match=f"in chunks.*{why}"):
        GeneralRunner(small(architecture, dtype=dtype), 2)


def test_an_adapter_of_a_weight_that_code_computes_with_is_refused(tmp_path):
    """By its files, before a step over several rows could fail of it."""
    targets = veneer.LoRA(rank=2, targets="classifier,o_proj")
    veneer.save(veneer.attach(small("longcat_flash"), targets), tmp_path)
    fit = Fit(small("longcat_flash"), None, None)
    entry = Entry("router", tmp_path, 0)
    with pytest.raises(AdapterError, match=r"classifier, which acts on whole batches") as caught:
        fit.check(fit.read(entry), entry)
    assert "o_proj" not in str(caught.value)


def test_a_bias_that_no_call_of_its_layer_adds_is_refused(tmp_path):
    model = veneer.attach(small("longcat_flash"), veneer.LoRA(rank=2, targets="o_proj"))
    state, model = capture(model), small("longcat_flash")
    (path, *_) = (path for path, _ in model.named_modules() if path.endswith(".classifier"))
    router = model.get_submodule(path)
    bias = torch.ones(len(router.weight))
    router.bias = torch.nn.Parameter(torch.zeros_like(bias))
    state = replace(state, modules_to_save={f"{path}.bias": bias})
    with pytest.raises(AdapterError, match=rf"has {path}\.bias beside its factors"):
        Fit(model, None, None).check(state, Entry("router", tmp_path, 0))


def test_the_context_of_mpt_is_known():
    assert EngineConfig().context_of(small_config("mpt")) == 64
