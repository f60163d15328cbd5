"""Adapters of experts in mlx-lm's format: mlx-lm reads ours, and we read its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from torch import Tensor

import veneer
from support.closeness import assert_same_logits
from support.every_architecture import small
from support.random_adapters import distance, ids, logits, shake
from veneer.formats.adapters import read
from veneer.formats.mlx_experts import MIXTURES

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
FAST = "mixtral"  # which mlx-lm names in a way of its own
EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in MIXTURES]


def base(model_type: str) -> Any:
    model = small(model_type)
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):  # the setting that mlx-lm takes for granted
            module.norm_topk_prob = model_type != "qwen2_moe"
    return model


def theirs(model_type: str) -> Any:
    """Return mlx-lm's own model with the random weights of ours."""
    model = base(model_type)
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    settings = model.config.to_dict()
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    settings |= {"mlp_only_layers": [], "norm_topk_prob": True, "decoder_sparse_step": 1}
    settings["num_experts"] = settings.get("num_experts", settings.get("num_local_experts"))
    settings["head_dim"] = model.model.layers[0].self_attn.head_dim
    other = module.Model(module.ModelArgs.from_dict(settings))
    weights = {}
    for name, value in model.state_dict().items():
        name = name.replace(".mlp.", f".{MIXTURES[model_type]}.")
        owner, _, leaf = name.rpartition(".")
        switch = owner.replace("experts", "switch_mlp")
        if leaf == "gate_up_proj":
            for projection, half in zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True):
                weights[f"{switch}.{projection}.weight"] = half
        elif leaf == "down_proj":
            weights[f"{switch}.down_proj.weight"] = value
        else:
            weights[name] = value
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    other.load_weights([(name, mx.array(value.numpy())) for name, value in weights.items()])
    return other


def their_logits(model: Any) -> Tensor:
    model.eval()
    return torch.from_numpy(np.array(model(mx.array(ids().numpy()))))


@pytest.mark.parametrize("model_type", EACH)
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_we_write_mlx_lm_reads(model_type, shared, tmp_path):
    assert_same_logits(their_logits(theirs(model_type)), base(model_type), logits)
    targets = ["self_attn.q_proj", "mlp.gate.weight", *STACKS]
    config = veneer.LoRA(rank=3, expert_rank=2, targets=targets, shared_expert_a=shared)
    model = shake(veneer.attach(base(model_type), config, seed=3))
    notes = veneer.save(model, tmp_path / "mlx", format="mlx")
    assert "One rank for all layers, 3" in " ".join(notes)
    opened = load_adapters(theirs(model_type), str(tmp_path / "mlx"))
    assert_same_logits(their_logits(opened), model, logits)
    assert distance(logits(model), logits(base(model_type))) > 0.01
    again = veneer.load(base(model_type), tmp_path / "mlx")
    assert_same_logits(logits(again), model, logits)


@pytest.mark.parametrize("model_type", EACH)
@pytest.mark.parametrize("keys", ["all", "up alone"])
def test_what_mlx_lm_writes_we_read(model_type, keys, tmp_path):
    model = theirs(model_type)
    chosen = None if keys == "all" else [f"{MIXTURES[model_type]}.switch_mlp.up_proj"]
    settings = {"rank": 4, "scale": 1.75, "dropout": 0.0, "keys": chosen}
    model.freeze()
    linear_to_lora_layers(model, -1, settings)
    mx.random.seed(7)
    new = {
        name: 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.trainable_parameters())
        if name.endswith((".lora_a", ".lora_b"))
    }
    model.load_weights(list(new.items()), strict=False)
    place = tmp_path / "theirs"
    place.mkdir()
    mx.save_safetensors(str(place / "adapters.safetensors"), new)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings}
    (place / "adapter_config.json").write_text(json.dumps(config | {"model": "some/base"}))
    ours = veneer.load(base(model_type), place)
    assert_same_logits(their_logits(model), ours, logits)
    assert distance(logits(ours), logits(base(model_type))) > 0.01


def test_names_that_are_not_known_are_refused(tmp_path):
    model = shake(veneer.attach(small("glm4_moe"), veneer.LoRA(rank=2, targets=STACKS), seed=0))
    with pytest.raises(veneer.AdapterError, match="has a name in mlx-lm that is known for qwen2"):
        veneer.save(model, tmp_path / "mlx", format="mlx")
    model = shake(veneer.attach(small(FAST), veneer.LoRA(rank=2, targets=STACKS), seed=0))
    veneer.save(model, tmp_path / "mlx", format="mlx")
    with pytest.raises(veneer.AdapterError, match="which is read over qwen2_moe"):
        read(Path(tmp_path / "mlx"), small("glm4_moe"))
