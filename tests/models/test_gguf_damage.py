"""GGUF models with bytes changed anywhere: a typed error or a model that loads, and soon."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from support.tiny_gguf import random_model, write_model
from veneer.errors import ModelError
from veneer.models import gguf


@pytest.fixture
def whole(tmp_path) -> bytes:
    return write_model("llama", random_model("llama"), tmp_path / "whole.gguf").read_bytes()


def tried(data: bytes, path: Path) -> str:
    """Return why the file is refused, or "" if it loads."""
    path.write_bytes(data)
    try:
        model = gguf.load_model(path, dtype=torch.float32)
    except ModelError as error:
        return str(error)
    assert isinstance(model, PreTrainedModel)
    return ""


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_is_one_clear_error_or_none(count, whole, tmp_path):
    random = np.random.default_rng(0)
    header = whole.index(b"output_norm.weight") + 100
    said = []
    for trial in range(count):
        data = bytearray(whole)
        if trial % 6 == 0:
            del data[random.integers(len(data)) :]
        for _ in range(random.integers(1, 4)):
            at = random.integers(len(whole) if trial % 4 == 0 else header)
            if at < len(data):
                data[at] = random.integers(256)
        said.append(tried(bytes(data), tmp_path / "damaged.gguf"))
    assert all("damaged.gguf" in why for why in said if why)
    assert 0.1 < sum(map(bool, said)) / count < 0.95


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "feed_forward_length", "vocab_size", "head_count"]
)
@pytest.mark.parametrize("value", [0, 2**31, 2**32 - 1])
def test_sizes_that_lie_end_at_once(key, value, whole, tmp_path):
    data = bytearray(whole)
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    assert tried(bytes(data), tmp_path / "damaged.gguf")


def test_a_weight_that_is_missing_is_not_made_up(whole, tmp_path):
    data = whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_us.weight")
    assert "lacks model.layers.1.mlp.up_proj.weight" in tried(data, tmp_path / "damaged.gguf")
