"""Bases of the shapes that people tune, with random weights.

Those that would take too long have a part of their layers, and as small a part of their vocabulary,
so that the head's share of a step stays what it is.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import veneer
from veneer.models.load import load_config_and_tokenizer

LEAST_VOCAB = 49_152  # of the tokenizer, which is SmolLM2's


def _gemma3(vocab: int, **sizes: int) -> Gemma3TextConfig:
    layers = sizes["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    return Gemma3TextConfig(
        vocab_size=vocab,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=kinds,
        tie_word_embeddings=True,
        **sizes,
    )


def config_of(shape: str) -> PretrainedConfig:
    """Return the configuration of one of SHAPES."""
    return SHAPES[shape]()


SHAPES = {
    "qwen3-0.6b": lambda: Qwen3Config(  # 7 layers of 28, a third of the vocabulary
        vocab_size=LEAST_VOCAB,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(  # 6 layers of 16, three eighths of the vocabulary
        vocab_size=LEAST_VOCAB,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "gemma3-270m": lambda: _gemma3(
        131_072, hidden_size=640, intermediate_size=2048, num_hidden_layers=9
    ),  # 9 layers of 18, half of the vocabulary
    "gemma3-1b": lambda: _gemma3(
        65_536, hidden_size=1152, intermediate_size=6912, num_hidden_layers=6
    ),  # 6 layers of 26, a quarter of the vocabulary
    "phi3-mini": lambda: Phi3Config(  # 3 layers of 32; its vocabulary is small
        vocab_size=LEAST_VOCAB,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=32,
        pad_token_id=0,
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(  # 64 experts of 256, 8 of them for each token; 3 layers
        vocab_size=LEAST_VOCAB,
        hidden_size=1024,
        moe_intermediate_size=256,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


def random_base(shape: str, dtype: str) -> veneer.Base:
    """Return a base of one of SHAPES, with random weights and SmolLM2's tokenizer."""
    torch.manual_seed(0)
    torch_dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    _, tokenizer = load_config_and_tokenizer("smollm2-135m")
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch_dtype)
    return veneer.Base(shape, model.requires_grad_(False), tokenizer)
