"""llama.cpp's names of a base's layers, and its order of their rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from veneer.adapter.new_tokens import is_tied
from veneer.adapter.targets import describe_base
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
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "gpt_oss": "gpt-oss",
}
# Tensors that llama.cpp multiplies in build_lora_mm and build_lora_mm_id, or looks rows up in with
# an adapter (llama-graph.cpp). It ignores adapters of all others, such as GPT-2's positions.
ADAPTED = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_gate", "ffn_up", "ffn_down"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"),
    *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    *("ffn_gate_inp", "ffn_gate_inp_shexp"),
    *("output", "token_embd"),
)
# The projections that a stack has one after the other, which llama.cpp names apart.
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj")}
ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Place:
    """A layer of the base in llama.cpp.

    name: of its weight in a GGUF file. heads: groups of rows that are in another order, 0 for none.
    is_stack: of experts. share: which of how many equal parts of a stack's rows it has, since
    llama.cpp keeps gate and up apart; woven: every second row of them, and not half after half.
    is_parameter: also a router, whose weight no layer has.
    """

    path: str
    name: str
    heads: int = 0
    is_embedding: bool = False
    is_parameter: bool = False
    is_stack: bool = False
    share: tuple[int, int] = (0, 1)
    woven: bool = False

    @property
    def takes_adapters(self) -> bool:
        """Whether llama.cpp applies an adapter to this layer."""
        return self.name.split(".")[-2] in ADAPTED

    def of(self, rows: Tensor) -> Tensor:
        """Return this place's share of a layer's rows, (..., out, width), in llama.cpp's order."""
        index, count = self.share
        if self.woven:
            return rows[..., index::count, :]
        return permuted(rows.chunk(count, dim=-2)[index], self.heads)


@dataclass(frozen=True)
class Naming:
    """The layers of a base by path, for one of llama.cpp's architectures.

    stacks: the places of a stack of experts, by its path, in the order of its rows.
    """

    architecture: str
    places: dict[str, Place]
    stacks: dict[str, tuple[Place, ...]]
    tied: bool  # whether the head is the embedding
    has_head: bool  # whether the architecture can have a head of its own

    def of(self, path: str) -> tuple[Place, ...]:
        """Return the places of a layer or stack; none where llama.cpp does not know it."""
        place = self.places.get(path)
        return self.stacks.get(path, () if place is None else (place,))

    @cached_property
    def by_name(self) -> dict[str, Place]:
        """The places by their names, and those of stacks that a file may have in one tensor."""
        every = [*self.places.values(), *(own for owns in self.stacks.values() for own in owns)]
        every += [
            replace(
                owns[0],
                name=owns[0].name.replace("ffn_gate_", "ffn_gate_up_"),
                share=(0, 1),
            )
            for owns in self.stacks.values()
            if len(owns) > 1
        ]
        return {place.name: place for place in every}


def naming_of(config: PretrainedConfig) -> Naming:
    """Return llama.cpp's names of a base's layers, without its weights.

    Raises AdapterError for an architecture that is not in ARCHITECTURES.
    """
    _refuse_unknown(config)
    with torch.device("meta"):
        return naming_over(AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def naming_over(skeleton: PreTrainedModel) -> Naming:
    """Return llama.cpp's names of a model's layers; it may be on the meta device.

    Raises AdapterError for an architecture that is not in ARCHITECTURES.
    """
    config = skeleton.config
    _refuse_unknown(config)
    architecture, kind = ARCHITECTURES[config.model_type], kind_of(config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = permuted_heads(config)
    places = {}
    stacks = {}
    for layer in describe_base(skeleton).layers:
        path = layer.path
        if layer.is_stack:
            owner, _, own = path.rpartition(".")
            projections = PROJECTIONS.get(own, (own,))
            gguf_names = [names.get_name(f"{owner}.{projection}") for projection in projections]
            shares = [(i, len(projections)) for i in range(len(projections))]
            woven = not getattr(layer.module, "is_concatenated", True)
            if None not in gguf_names:
                stacks[path] = tuple(
                    Place(
                        path,
                        f"{name}.weight",
                        is_parameter=True,
                        is_stack=True,
                        share=share,
                        woven=woven,
                    )
                    for name, share in zip(gguf_names, shares, strict=True)
                )
            continue
        name = names.get_name(path.removesuffix(".weight") if layer.is_matrix else path)
        if name is not None and (layer.is_adaptable or layer.is_matrix):
            groups = heads.get(name.rpartition(".")[2], 0)
            is_embedding = layer.kind == "embedding"
            places[path] = Place(path, f"{name}.weight", groups, is_embedding, layer.is_matrix)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    assert embedding is not None
    assert head is not None
    has_head = gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[kind]
    return Naming(architecture, places, stacks, is_tied(embedding, head), has_head)


def _refuse_unknown(config: PretrainedConfig) -> None:
    if config.model_type not in ARCHITECTURES:
        raise AdapterError(
            f"GGUF adapters are for {', '.join(ARCHITECTURES)}, not for {config.model_type}; "
            "the formats native and peft are for any model."
        )


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
