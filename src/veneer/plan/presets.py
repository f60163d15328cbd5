"""Well-known models' config.json, as far as it decides shapes."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


LLAMA_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)


def _llama(*sizes: int, **others: Any) -> Config:
    return {"model_type": "llama", **dict(zip(LLAMA_SIZES, sizes, strict=True)), **others}


def _qwen2(*sizes: int, tied: bool) -> Config:
    return _llama(*sizes, 32768, model_type="qwen2", tie_word_embeddings=tied)


def _gpt2(dim: int, depth: int, heads: int) -> Config:
    return {
        "model_type": "gpt2",
        "n_embd": dim,
        "n_layer": depth,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


def _roberta(dim: int, depth: int, heads: int) -> Config:
    return {
        "model_type": "roberta",
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }


def _minigpt(dim: int, depth: int, heads: int, context: int, vocab: int) -> Config:
    return {
        "model_type": "minigpt",
        "embed_dim": dim,
        "feed_forward_dim": 4 * dim,
        "num_layers": depth,
        "num_heads": heads,
        "context": context,
        "vocab_size": vocab,
    }


PRESETS: dict[str, Config] = {
    # The defaults of models/minigpt.py.
    "minigpt": _minigpt(64, 4, 4, 256, 1024),
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True),
    # huggyllama/llama-7b; Touvron et al. 2023, arXiv 2302.13971, table 2
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    # meta-llama/Llama-2-*; Touvron et al. 2023, arXiv 2307.09288
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    # meta-llama/Meta-Llama-3-*; Grattafiori et al. 2024, arXiv 2407.21783, table 3
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    # mistralai/Mistral-7B-v0.1; Jiang et al. 2023, arXiv 2310.06825, table 1
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, 32768, model_type="mistral"),
    # Qwen/Qwen2.5-*; Qwen 2024, arXiv 2412.15115, table 1
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064, tied=False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064, tied=False),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064, tied=False),
    # openai-community/gpt2*; Radford et al. 2019, table 2
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Brown et al. 2020, arXiv 2005.14165, table 2.1. Nobody published its modules; MiniGPT has the
    # same parts, with q, k and v apart, as the LoRA paper counts them.
    "gpt-3": _minigpt(12288, 96, 96, 2048, 50257),
    # FacebookAI/roberta-*; Liu et al. 2019, arXiv 1907.11692
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
}
