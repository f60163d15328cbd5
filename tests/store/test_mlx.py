"""Law 5, for mlx-lm's format: mlx-lm itself reads what we write, and we read what it writes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import veneer
from adapted import ids, shake, targets_named
from tiny import tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SAME_PATHS = ("llama", "qwen2", "qwen3", "gemma", "phi")  # model.layers., as in transformers
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3, "targets": "all"},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r".*\.1\..*": 5},
        "alpha_pattern": {r".*\.0\..*": 2.5},
    },
    "dropout": {"dropout": 0.25},
    "last block": {"layers": "-1", "targets": "mlp"},
    "first block": {"layers": "0", "targets": "attention"},
    "one of each": {"targets": "re:0.*(q_proj|c_attn|query_key_value)$|1.*(down_proj|c_fc|fc1)$"},
    "dora": {"dora": True, "targets": "all"},
    "dora with patterns": {"dora": True, "alpha_pattern": {r".*\.0\..*": 7}},
    "pissa": {"init": "pissa", "targets": "all"},
}


def adapted(architecture: str, case: str = "plain", **more: Any) -> Any:
    options: dict[str, Any] = {"rank": 3, "targets": "attention"} | CASES[case] | more
    model = tiny(architecture)
    options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options), seed=3))


# mlx-lm itself, where it is installed (on Linux it computes on the processor).

THEIRS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "phi": "phi",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
}


def theirs(architecture: str) -> Any:
    """Return mlx-lm's own model with the random weights of ours."""
    import importlib

    import mlx.core as mx

    model = tiny(architecture)
    module = importlib.import_module(f"mlx_lm.models.{THEIRS[architecture]}")
    settings = model.config.to_dict()
    rope = settings.get("rope_parameters") or {}
    settings |= {"rope_theta": rope.get("rope_theta", 10000.0)}
    if "partial_rotary_factor" in rope:
        settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if architecture == "gpt_neox":
        settings |= {
            "rotary_emb_base": settings["rope_theta"],
            "rotary_pct": rope.get("partial_rotary_factor", 0.25),
        }
    other = module.Model(module.ModelArgs.from_dict(settings))
    weights = {
        name.removeprefix("transformer."): mx.array(value.numpy())
        for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    if hasattr(other, "sanitize"):
        weights = other.sanitize(weights)
    other.load_weights(list(weights.items()))
    return other


def their_logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    import mlx.core as mx

    given = ids() if tokens is None else tokens
    return torch.from_numpy(np.array(model(mx.array(given.numpy()))))


@pytest.fixture(scope="module")
def mlx_lm() -> Any:
    pytest.importorskip("mlx.core")
    return pytest.importorskip("mlx_lm.tuner.utils")
