"""GGUF models whose sizes lie or that lack a weight are refused at once, by name."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from support.tiny_gguf import random_model, write_model
from veneer.errors import ModelError
from veneer.models import gguf


@pytest.fixture
def whole(tmp_path) -> bytes:
    return write_model("llama", random_model("llama"), tmp_path / "whole.gguf").read_bytes()


def why_refused(data: bytes, path: Path) -> str:
    """Return why the file is refused, or "" if it loads."""
    path.write_bytes(data)
    try:
        model = gguf.load_model(path, dtype=torch.float32)
    except ModelError as error:
        return str(error)
    assert isinstance(model, PreTrainedModel)
    return ""


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "feed_forward_length", "vocab_size", "head_count"]
)
@pytest.mark.parametrize("value", [0, 2**31, 2**32 - 1])
def test_sizes_that_lie_end_at_once(key, value, whole, tmp_path):
    data = bytearray(whole)
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    assert why_refused(bytes(data), tmp_path / "damaged.gguf")


def test_a_weight_that_is_missing_is_not_made_up(whole, tmp_path):
    data = whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_us.weight")
    assert "lacks model.layers.1.mlp.up_proj.weight" in why_refused(data, tmp_path / "damaged.gguf")
