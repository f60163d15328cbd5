"""The compiled step: what the model's own forward gives, and to the bit the same in any company."""

from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import distance, ids
from support.serving_bases import write_adapters
from support.tiny_models import quantized, tiny
from veneer.kernels import native
from veneer.serve.engine.adapter_cache import Loaded, Resident
from veneer.serve.engine.compiled import Compiled, Unsuited
from veneer.serve.engine.general import General
from veneer.serve.engine.library import Library
from veneer.serve.engine.runner import Chunk
from veneer.serve.engine.runners import runner_for

pytestmark = pytest.mark.skipif(native.library_of("decode")[0] is None, reason="no C++ compiler")

MIX = {"plain": 0.6, "dora": -0.5, "wide": 0.3}
ROWS = ("plain", None, "wide", "dora", MIX, "pissa")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
BASES: dict[str, Any] = {
    "float32": lambda architecture: tiny(architecture),
    "bfloat16": lambda architecture: tiny(architecture, dtype=torch.bfloat16),
    "nf4": lambda architecture: quantized(architecture),
    "int8": lambda architecture: quantized(architecture, 8),
}


@pytest.fixture
def homes(tmp_path, request):
    return write_adapters(tmp_path, getattr(request, "param", "llama"))


def loaded(model: Any, homes: dict) -> dict[str | None, Loaded | None]:
    library, resident = Library(homes), Resident(model, 2**30)
    found: dict[str | None, Loaded | None] = {
        name: resident.get(((library.info(name), 1.0),)) for name in homes
    }
    mix = tuple((library.info(name), weight) for name, weight in MIX.items())
    return found | {None: None, "mix": resident.get(mix)}


def of(found: dict, which: Any) -> Loaded | None:
    return found["mix" if isinstance(which, dict) else which]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("homes", ["llama", "mistral", "qwen2"], indirect=True)
def test_each_row_is_what_the_model_gives(homes, kind, request):
    architecture = request.node.callspec.params["homes"]
    model = BASES[kind](architecture)
    tokens = ids(len(ROWS), 19)
    runner = Compiled(model, len(ROWS), 64)
    found = loaded(model, homes)
    chunks = [
        Chunk(slot, row.tolist(), 0, of(found, which), "all", False)
        for slot, (row, which) in enumerate(zip(tokens, ROWS, strict=True))
    ]
    logits = runner.step(chunks).view(*tokens.shape, -1)
    for name, home in homes.items():
        veneer.load(model, home, name=name, force=kind != "float32")
    for row, which, ours in zip(tokens, ROWS, logits, strict=True):
        veneer.use(model, which)
        with torch.no_grad():
            wanted = model(row[None], use_cache=False).logits[0].float()
        assert distance(ours, wanted) < CLOSE[model.dtype], which


@pytest.mark.parametrize("kind", BASES)
def test_the_same_to_the_bit_in_any_company(homes, kind):
    model = BASES[kind]("llama")
    tokens = ids(len(ROWS), 37)
    found = loaded(model, homes)
    runner = Compiled(model, len(ROWS), 64)

    def read(slot: int, first: int, last: int, wanted: Any = "all") -> Chunk:
        some = tokens[slot, first:last].tolist()
        return Chunk(slot, some, first, of(found, ROWS[slot]), wanted, last - first == 1)

    together = runner.step([read(slot, 0, 37) for slot in range(len(ROWS))])
    together = together.view(*tokens.shape, -1)
    for slot in range(len(ROWS)):
        runner.free(slot)
    # One by one, in pieces, and the last ones token by token beside others.
    pieces: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(len(ROWS))}
    for slot in range(len(ROWS)):
        for first, last in ((0, 16), (16, 16 + slot), (16 + slot, 30)):
            if last > first:
                pieces[slot].append(runner.step([read(slot, first, last)]))
    for at in range(30, 37):
        order = [*range(at % len(ROWS), len(ROWS)), *range(at % len(ROWS))]
        logits = runner.step([read(slot, at, at + 1) for slot in order])
        for slot, one in zip(order, logits.split(1), strict=True):
            pieces[slot].append(one)
    for slot, row in pieces.items():
        assert torch.equal(torch.cat(row), together[slot]), ROWS[slot]


def test_what_is_kept_goes_into_another_slot():
    runner = Compiled(tiny("llama"), 2, 64)
    tokens = ids(1, 40)[0].tolist()
    wanted = runner.step([Chunk(0, tokens, 0, None, "last", False)])
    runner.put(1, [runner.keep(0, 0, 16), runner.keep(0, 16, 32)])
    assert torch.equal(runner.step([Chunk(1, tokens[32:], 32, None, "last", False)]), wanted)


def test_a_row_may_outgrow_its_memory():
    model = tiny("llama")
    model.config.max_position_embeddings = 700
    runner = Compiled(model, 1, 700)
    tokens = ids(1, 600)[0].tolist()
    for first in range(0, 600, 150):
        logits = runner.step([Chunk(0, tokens[first : first + 150], first, None, "last", False)])
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert distance(logits[0], wanted) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "gemma", "gpt2", "minigpt"])
def test_other_models_take_their_own_way_and_it_is_said(architecture):
    with pytest.raises(Unsuited):
        Compiled(tiny(architecture), 2, 64)
    runner, notices = runner_for(tiny(architecture), 2, 64)
    assert isinstance(runner, General)
    assert "slower" in notices[0]


def test_a_layer_that_does_something_else_is_noticed():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(Unsuited, match="layers are not"):
        Compiled(model, 2, 64)
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda *parts: 2 * parts[2])
    with pytest.raises(Unsuited, match="something else"):
        Compiled(model, 2, 64)
