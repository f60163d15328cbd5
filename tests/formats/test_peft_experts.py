"""Adapters of experts in PEFT's files: PEFT gives our logits of what we write, and we PEFT's
of what it writes, also where it takes names of layers for those of experts. Older files have one
adapter for each expert."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from support.every_architecture import MODEL_TYPES, NO_MODEL, small
from support.peft_cases import base as peft_base
from support.peft_cases import theirs, written
from support.random_adapters import distance, ids, shake
from veneer.formats.base_structure import BaseStructure
from veneer.formats.capture import capture, layer_tensors
from veneer.formats.convert import convert
from veneer.formats.peft import directory as store
from veneer.formats.peft.experts import taken_for_stacks
from veneer.models.description import describe

PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Stacks that are transposed and have biases; experts without a gate. Of the others, glm4_moe has
# shared experts, a dense layer first, and names that PEFT takes for those of experts.
FAST = ["gpt_oss", "nemotron_h"]
# PEFT renames keys of these when it loads them, and does not find its own.
LOST_IN_PEFT = {"inkling2_text", "inkling2_loop_text", "laguna"}


def each_mixture() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        types = [t for t in MODEL_TYPES if t not in NO_MODEL and t not in LOST_IN_PEFT]
    return [pytest.param(t, marks=[] if t in FAST else [pytest.mark.slow]) for t in types]


def stacks_of(model: Any) -> list[str]:
    return [
        layer.path
        for layer in describe(model).layers
        if layer.kind == "experts" and layer.name in PROJECTIONS
    ]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=ids(), use_cache=False).logits


def opened(base: Any, place: Path) -> Any:
    with warnings.catch_warnings():
        # All that PEFT says of keys that it does not find.
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not found)")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), place)


def assert_same(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    assert distance(ours, theirs) < 1e-5
    assert distance(ours, base) > 1e-3


@pytest.mark.parametrize("model_type", each_mixture())
def test_both_ways(model_type, tmp_path):
    base = small(model_type)
    if not (stacks := stacks_of(base)):
        pytest.skip("no mixture")
    known = {path.rpartition(".")[2] for path in BaseStructure(base).layers}
    targets = sorted(known.intersection(NAMES))
    model = copy.deepcopy(base)
    veneer.attach(model, veneer.LoRA(rank=2, targets=[*targets, *stacks]), seed=0)
    expected = logits(shake(model))
    veneer.save(model, tmp_path / "ours", format="peft")
    assert torch.equal(logits(veneer.load(copy.deepcopy(base), tmp_path / "ours")), expected)
    assert_same(logits(opened(base, tmp_path / "ours")), expected, logits(base))
    assert not read_config(tmp_path / "ours").get("lora_dropout")

    # The names that people give in PEFT, some of which are of experts alone there.
    names = sorted({*targets, *taken_for_stacks(NAMES, base.config.model_type), "down_proj"})
    for place, asked in (("names", names), ("all", "all-linear")):
        if targets if place == "names" else model_type in ("glm4_moe", "gpt_oss"):
            peer = their_own(base, asked, tmp_path / place)
            ours = veneer.load(copy.deepcopy(base), tmp_path / place)
            assert_same(logits(ours), logits(peer), logits(base))


def their_own(base: Any, targets: Any, place: Path) -> Any:
    """Return PEFT's own model with a random adapter, and write that to `place`."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(7)
    for weight in peer.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    written(peer, place)
    return peer


def read_config(place: Path) -> dict[str, Any]:
    return json.loads((place / store.CONFIG).read_text())


# Of each kind of mixture: the modules in a block of a file of before transformers 5.
OLDER = {
    "mixtral": ("block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
}


def older_file(
    model_type: str,
    place: Path,
    *,
    names: tuple[str, ...],
    experts: int = 0,
    blocks: int = 2,
    **settings: Any,
) -> Any:
    """Write an adapter with one of its own for each expert, and return its base."""
    base = peft_base(model_type)
    owner, projections = OLDER[model_type]
    stacks = {
        path.rpartition(".")[2]: dict(base.named_parameters())[path] for path in stacks_of(base)
    }
    (_, rows, in_), (count, _, inner) = stacks["gate_up_proj"].shape, stacks["down_proj"].shape
    sizes = dict(zip(projections, [(rows // 2, in_)] * 2 + [(in_, inner)], strict=True))
    tensors = {}
    generator = torch.Generator().manual_seed(5)
    for block in range(blocks):
        for expert in range(experts or count):
            for name in names:
                path = f"base_model.model.model.layers.{block}.{owner.format(expert)}{name}"
                out, width = sizes[name]
                for half, shape in (("lora_A", (3, width)), ("lora_B", (out, 3))):
                    values = 0.3 * torch.randn(shape, generator=generator)
                    tensors[f"{path}.{half}.weight"] = values
    place.mkdir()
    save_file(tensors, place / store.WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5}
    config |= {"target_modules": [*names]} | settings
    (place / store.CONFIG).write_text(json.dumps(config))
    return base


@pytest.mark.parametrize(
    ("model_type", "rslora"),
    [
        ("mixtral", False),
        ("qwen3_moe", True),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", False, marks=pytest.mark.slow),
    ],
)
def test_one_adapter_for_each_expert(model_type, rslora, tmp_path):
    _, names = OLDER[model_type]
    base = older_file(model_type, tmp_path / "old", names=names)
    model = veneer.load(copy.deepcopy(base), tmp_path / "old")
    assert_same(logits(model), logits(opened(base, tmp_path / "old")), logits(base))
    if rslora:  # of which PEFT doubles alpha with the rank, and so makes another scale
        old = logits(model)
        edit(tmp_path / "old", use_rslora=True, lora_alpha=5 / 3**0.5)
        model = veneer.load(copy.deepcopy(base), tmp_path / "old")
        assert distance(logits(model), old) < 1e-6
    for format in ("peft", "native"):
        veneer.save(model, tmp_path / format, format=format)
        again = veneer.load(copy.deepcopy(base), tmp_path / format)
        assert torch.equal(logits(again), logits(model))
    assert_same(logits(opened(base, tmp_path / "peft")), logits(model), logits(base))


def edit(place: Path, **changes: Any) -> None:
    (place / store.CONFIG).write_text(json.dumps(read_config(place) | changes))


def test_single_projections_and_experts_of_older_files(tmp_path):
    """One of two projections that are one stack now, with ranks and scalings of their own."""
    place = tmp_path / "old"
    base = older_file(
        "mixtral",
        place,
        names=("w3",),
        experts=2,
        target_modules=r".*\.experts\.[01]\.w3",
        alpha_pattern={r"experts\.1\.w3": 9, "layers.0.block_sparse_moe.experts.0.w3": 4},
    )
    model = veneer.load(copy.deepcopy(base), place)
    plain = copy.deepcopy(base)
    tensors = load_file(place / store.WEIGHTS)
    for key, B in tensors.items():
        if match := re.search(r"layers\.(\d)\.block_sparse_moe\.experts\.(\d)\.w3\.lora_B", key):
            block, expert = int(match[1]), int(match[2])
            alpha = 9 if expert else 5 if block else 4
            stack = plain.model.layers[block].mlp.experts.gate_up_proj.data
            A = tensors[key.replace("lora_B", "lora_A")]
            stack[expert, stack.shape[1] // 2 :] += alpha / 3 * (B @ A)
    assert_same(logits(model), logits(plain), logits(base))
    edit(place, alpha_pattern={"nothing": 1})
    veneer.load(copy.deepcopy(base), place)  # PEFT ignores patterns that match nothing


@pytest.mark.parametrize(
    ("ours", "changes", "message"),
    [
        (
            {"experts": 3},
            {},
            r"missing for model\.layers\.0\.block_sparse_moe\.experts\.3\.w1, .*3\.w2",
        ),
        ({"blocks": 1}, {}, r"missing for model\.layers\.1\.block_sparse_moe\.experts\.0\.w1"),
        (
            {},
            {"target_modules": ["w1", "w2", "w3", "q_proj"]},
            r"missing for .*1\.self_attn\.q_proj",
        ),
        ({"experts": 3}, {"target_modules": "all-linear"}, "missing for .* and 11 more"),
        ({}, {"target_modules": ["w1", "w3"]}, r"experts\.0\.w2 has weights, but is not among"),
        ({"blocks": 1}, {"layers_to_transform": [0]}, None),
    ],
)
def test_older_files_that_lack_what_they_name(ours, changes, message, tmp_path):
    settings = {"names": OLDER["mixtral"][1]} | ours
    base = older_file("mixtral", tmp_path / "old", **settings)
    edit(tmp_path / "old", **changes)
    if message is None:
        veneer.load(base, tmp_path / "old")
    else:
        with pytest.raises(veneer.AdapterError, match=message):
            veneer.load(base, tmp_path / "old")


def test_a_projection_that_an_older_file_lacks_wholly_is_said(tmp_path):
    base = older_file("mixtral", tmp_path / "old", names=("w1", "w2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.VeneerWarning)
        expected = logits(veneer.load(copy.deepcopy(base), tmp_path / "old"))
    edit(tmp_path / "old", target_modules=["w1", "w2", "w3", "fc"])
    with pytest.warns(veneer.VeneerWarning, match=r"name fc, w3 too, of which it has no weights"):
        model = veneer.load(copy.deepcopy(base), tmp_path / "old")
    assert torch.equal(logits(model), expected)


def test_a_stack_that_is_adapted_twice_is_refused(tmp_path):
    base = older_file("mixtral", tmp_path / "old", names=("w2",))
    veneer.attach(base, veneer.LoRA(rank=3, alpha=5, targets="experts.down_proj", expert_rank=3))
    veneer.save(base, tmp_path / "new", format="peft")
    both = load_file(tmp_path / "old" / store.WEIGHTS) | load_file(tmp_path / "new" / store.WEIGHTS)
    save_file(both, tmp_path / "old" / store.WEIGHTS)
    edit(tmp_path / "old", target_parameters=read_config(tmp_path / "new")["target_parameters"])
    with pytest.raises(veneer.AdapterError) as refused:
        veneer.load(peft_base("mixtral"), tmp_path / "old")
    assert "layers.0.mlp.experts.down_proj has an adapter as a stack, and so have its" in str(
        refused.value
    )
    assert "block_sparse_moe.experts.0.w2" in str(refused.value)


def test_experts_that_the_base_lacks(tmp_path):
    base = older_file("mixtral", tmp_path / "old", names=("w2",), experts=6)
    with pytest.raises(veneer.AdapterError, match=r"experts\.5\.w2 is no layer of this model"):
        veneer.load(base, tmp_path / "old")


def test_a_layer_adapted_by_its_weights_name(tmp_path):
    options = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
    peer = theirs("llama", options)
    written(peer, tmp_path / "peft")
    model = veneer.load(peft_base("llama"), tmp_path / "peft")
    assert_same(logits(model), logits(peer), logits(peft_base("llama")))
    assert {*veneer.adapters(model)["default"].targets} == {"q_proj"}


def test_dense_layers_of_a_mixture_are_written_by_their_weights_or_a_note_asks_for_the_base(
    tmp_path,
):
    base = small("glm4_moe")
    model = veneer.attach(copy.deepcopy(base), veneer.LoRA(rank=2, targets=["0.mlp.down_proj"]))
    state = capture(shake(model))
    weight = "model.layers.0.mlp.down_proj.weight"
    base.config.save_pretrained(tmp_path / "base")
    named = replace(state, base_name=str(tmp_path / "base"))
    for case, own, structure in (("given", state, BaseStructure(base)), ("named", named, None)):
        assert not store.write(own, tmp_path / case, structure)
        assert read_config(tmp_path / case)["target_parameters"] == [weight]
    unknown = replace(state, base_name="some/base")
    (note,) = store.write(unknown, tmp_path / "unknown")
    assert "The base, some/base, cannot be looked at" in note
    assert "PEFT takes down_proj for the names of its experts" in note


def test_what_peft_cannot_hold_beside_experts_is_refused(tmp_path):
    model = small("glm4_moe")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["shared_experts.down_proj"], dora=True))
    with pytest.raises(
        veneer.AdapterError, match=r"PEFT takes the names of .*shared_experts\.down"
    ):
        veneer.save(model, tmp_path / "peft", format="peft")


@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ranks_of_experts_and_an_a_that_they_share(shared, tmp_path):
    base = small("qwen3_moe")
    targets = ["all", *stacks_of(base)]
    config = veneer.LoRA(rank=3, expert_rank=2, shared_expert_a=shared, targets=targets)
    model = veneer.attach(copy.deepcopy(base), config, seed=0)
    expected = logits(shake(model))
    stack = stacks_of(base)[0]
    for format in ("native", "peft"):
        veneer.save(model, tmp_path / format, format=format)
        again = veneer.load(copy.deepcopy(base), tmp_path / format)
        assert_same(logits(again), expected, logits(base))
        A = layer_tensors(again, "default")[f"{stack}.lora_parameter_A"]
        assert A.shape[:-1] == ((2,) if shared and format == "native" else (4, 2))
    assert_same(logits(opened(base, tmp_path / "peft")), expected, logits(base))
    convert(tmp_path / "native", tmp_path / "converted", to="peft")
    assert_same(logits(opened(base, tmp_path / "converted")), expected, logits(base))
