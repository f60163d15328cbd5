"""llama.cpp's names of a base's layers, and its order of their rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from veneer.adapter.new_tokens import is_tied
from veneer.adapter.targets import adaptable_layers
from veneer.errors import AdapterError

# model_type: llama.cpp's own architecture (convert_hf_to_gguf.py).
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
# Tensors that llama.cpp multiplies in build_lora_mm, or looks rows up in with an adapter
# (llama-graph.cpp). It ignores adapters of all others, such as GPT-2's positions.
ADAPTED = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_gate", "ffn_up", "ffn_down"),
    *("output", "token_embd"),
)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Place:
    """A layer of the base in llama.cpp.

    name: of its weight in a GGUF file. heads: groups of rows that are in another order, 0 for none.
    """

    path: str
    name: str
    heads: int
    is_embedding: bool

    @property
    def takes_adapters(self) -> bool:
        """Whether llama.cpp applies an adapter to this layer."""
        return self.name.split(".")[-2] in ADAPTED


@dataclass(frozen=True)
class Naming:
    """The layers of a base by path, for one of llama.cpp's architectures."""

    architecture: str
    places: dict[str, Place]
    tied: bool  # whether the head is the embedding
    has_head: bool  # whether the architecture can have a head of its own


def naming_of(config: PretrainedConfig) -> Naming:
    """Return llama.cpp's names of a base's layers, without its weights.

    Raises AdapterError for an architecture that is not in ARCHITECTURES.
    """
    if config.model_type not in ARCHITECTURES:
        raise AdapterError(
            f"GGUF adapters are for {', '.join(ARCHITECTURES)}, not for {config.model_type}; "
            "the formats native and peft are for any model."
        )
    with torch.device("meta"):
        return naming_over(AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def naming_over(skeleton: PreTrainedModel) -> Naming:
    """Return llama.cpp's names of a model's layers; it may be on the meta device."""
    config = skeleton.config
    architecture, kind = ARCHITECTURES[config.model_type], kind_of(config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = permuted_heads(config)
    places = {}
    for layer in adaptable_layers(skeleton):
        name = names.get_name(layer.path)
        if name is not None:
            groups = heads.get(name.rpartition(".")[2], 0)
            places[layer.path] = Place(layer.path, f"{name}.weight", groups, not layer.is_linear)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    assert embedding is not None
    assert head is not None
    has_head = gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[kind]
    return Naming(architecture, places, is_tied(embedding, head), has_head)


def kind_of(model_type: str) -> gguf.MODEL_ARCH:
    """Return gguf's own value for an architecture of ARCHITECTURES."""
    architecture = ARCHITECTURES[model_type]
    return next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def permuted_heads(config: Any) -> dict[str, int]:
    """Return the heads of the tensors whose rows are permuted.

    llama.cpp's llama and smollm3 rotate neighbouring rows, transformers rows half a head apart.
    """
    if ARCHITECTURES[config.model_type] not in ("llama", "smollm3"):
        return {}
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, ...) in llama.cpp's order: in each head, i and i + half side by side."""
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, ...) in transformers' order from llama.cpp's."""
    if not heads:
        return rows
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
