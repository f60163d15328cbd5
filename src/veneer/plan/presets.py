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


def _qwen3(
    dim: int, inner: int, depth: int, heads: int, *, tied: bool = False, **others: Any
) -> Config:
    settings: Config = {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": tied}
    return _llama(dim, inner, depth, heads, 8, 151936, 40960) | settings | others


def _gemma3(
    dim: int, inner: int, depth: int, heads: int, kv_heads: int, head_dim: int, **others: Any
) -> Config:
    """The text part of the larger ones: published beside a vision tower, which is not counted."""
    settings: Config = {
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "sliding_window": 1024,
    }
    return _llama(dim, inner, depth, heads, kv_heads, 262208, 131072) | settings | others


def _gpt_oss(depth: int, experts: int) -> Config:
    return _llama(
        *(2880, 2880, depth, 64, 8, 201088, 131072),
        model_type="gpt_oss",
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
    )


def _glm4(
    dim: int, inner: int, depth: int, *, expert: int, experts: int, dense: int, qk_norm: bool
) -> Config:
    return _llama(
        *(dim, inner, depth, 96, 8, 151552, 131072),
        model_type="glm4_moe",
        head_dim=128,
        attention_bias=True,
        use_qk_norm=qk_norm,
        moe_intermediate_size=expert,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=dense,
    )


def _deepseek3(vocab: int, context: int, *, heads: int, experts: int, dense: int) -> Config:
    return _llama(
        *(7168, 18432, 61, heads, heads, vocab, context),
        model_type="deepseek_v3",
        moe_intermediate_size=2048,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=dense,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )


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
    # Qwen/Qwen3-*; Qwen 2025, arXiv 2505.09388, tables 1 and 2. Parameters of the published files,
    # a tied head once: 596,049,920; 1,720,574,976; 4,022,468,096; 8,190,735,360; 14,768,307,200;
    # 32,762,123,264; 30,532,122,624.
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(
        *(2048, 6144, 48, 32),
        model_type="qwen3_moe",
        num_key_value_heads=4,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    # google/gemma-3-*; Gemma Team 2025, arXiv 2503.19786, table 1. Published files: 268,098,176;
    # 999,885,952; with the vision tower 4,300,079,472; 12,187,325,040; 27,432,406,640.
    "gemma-3-270m": _gemma3(
        640,
        2048,
        18,
        4,
        1,
        256,
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
    ),
    "gemma-3-1b": _gemma3(
        1152,
        6912,
        26,
        4,
        1,
        256,
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
    ),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128, query_pre_attn_scalar=168),
    # openai/gpt-oss-*; OpenAI 2025, arXiv 2508.10925, table 1: 20.91 B and 116.83 B.
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    # meta-llama/Llama-3.2-*. Published files: 1,235,814,400 and 3,212,749,824.
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, tie_word_embeddings=True
    ),
    # meta-llama/Llama-4-Scout-17B-16E, its text part. Published file, with a vision model:
    # 108,641,793,536.
    "llama-4-scout": _llama(
        *(5120, 8192, 48, 40, 8, 202048, 10485760),
        model_type="llama4_text",
        head_dim=128,
        intermediate_size_mlp=16384,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
    # microsoft/phi-4; Abdin et al. 2024, arXiv 2412.08905. Published file: 14,659,507,200.
    "phi-4": _llama(5120, 17920, 40, 40, 10, 100352, 16384, model_type="phi3"),
    # microsoft/Phi-4-mini-instruct; Microsoft 2025, arXiv 2503.01743. File: 3,836,021,760.
    "phi-4-mini": _llama(
        *(3072, 8192, 32, 24, 8, 200064, 131072),
        model_type="phi3",
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
    # HuggingFaceTB/SmolLM3-3B. Published file: 3,075,098,624.
    "smollm3-3b": _llama(
        2048, 11008, 36, 16, 4, 128256, 65536, model_type="smollm3", tie_word_embeddings=True
    ),
    # mistralai/Mistral-Small-24B-Base-2501. Published file: 23,572,403,200.
    "mistral-small-24b": _llama(
        *(5120, 32768, 40, 32, 8, 131072, 32768),
        model_type="mistral",
        head_dim=128,
        sliding_window=None,
    ),
    # mistralai/Mixtral-8x7B-v0.1; Jiang et al. 2024, arXiv 2401.04088. Published file:
    # 46,702,792,704.
    "mixtral-8x7b": _llama(
        *(4096, 14336, 32, 32, 8, 32000, 32768),
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    # Qwen/Qwen3-Next-80B-A3B-Instruct: 80 B, without the layer that predicts a second token.
    "qwen3-next-80b-a3b": _llama(
        *(2048, 5120, 48, 16, 2, 151936, 262144),
        model_type="qwen3_next",
        head_dim=256,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
    ),
    # deepseek-ai/DeepSeek-V3; DeepSeek-AI 2024, arXiv 2412.19437, section 4.2: 671 B, without the
    # further layer that predicts a second token, which transformers does not build.
    "deepseek-v3": _deepseek3(129280, 163840, heads=128, experts=256, dense=3),
    # moonshotai/Kimi-K2-Instruct; Kimi Team 2025, arXiv 2507.20534: 1 T.
    "kimi-k2": _deepseek3(163840, 131072, heads=64, experts=384, dense=1),
    # zai-org/GLM-4.5*; GLM-4.5 Team 2025, arXiv 2508.06471, table 1: 355 B and 106 B. Published
    # files, with that further layer: 358,337,791,296 and 110,468,824,832.
    "glm-4.5": _glm4(5120, 12288, 92, expert=1536, experts=160, dense=3, qk_norm=True),
    "glm-4.5-air": _glm4(4096, 10944, 46, expert=1408, experts=128, dense=1, qk_norm=False),
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
