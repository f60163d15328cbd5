"""Architectures with LLaMA's skeleton: its paths, with other norms, biases and projections."""

from __future__ import annotations

from dataclasses import replace

from veneer.plan.rows import (
    Architecture,
    attention,
    embedding,
    gated,
    head,
    layer_norm,
    linear,
    norm,
)

BOTH_NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
HEAD_NORMS = (norm("self_attn.q_norm", "head_dim"), norm("self_attn.k_norm", "head_dim"))
FOUR_NORMS = (
    *BOTH_NORMS,
    norm("pre_feedforward_layernorm"),
    norm("post_feedforward_layernorm"),
)

LLAMA = Architecture(
    before=(embedding("model.embed_tokens", "words"),),
    stack="model.layers",
    block=(*attention("attention_bias", "attention_bias"), *gated("mlp_bias"), *BOTH_NORMS),
    after=(norm("model.norm"), head("lm_head")),
    fused=True,
)
GEMMA = replace(LLAMA, fused=False, defaults={"tie_word_embeddings": True, "head_dim": 256})
GEMMA2 = replace(
    GEMMA,
    block=(*LLAMA.block[:-2], *FOUR_NORMS),
    defaults=dict(GEMMA.defaults) | {"num_key_value_heads": 4, "final_logit_softcapping": 30.0},
    score_bytes=8,  # capped ones, and probabilities in float32 and in the dtype of computing
)

LLAMA_LIKE: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": replace(
        LLAMA,
        block=(*attention(False, False), *gated(), *BOTH_NORMS),
        defaults={"num_key_value_heads": 8},
    ),
    "granite": LLAMA,
    "qwen2": replace(LLAMA, block=(*attention(True, False), *gated(), *BOTH_NORMS)),
    "qwen3": replace(
        LLAMA,
        block=(*LLAMA.block[:4], *HEAD_NORMS, *gated(), *BOTH_NORMS),
        defaults={"head_dim": 128},
        fused=False,
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA,
        block=(*LLAMA.block[:4], *HEAD_NORMS, *gated(), *FOUR_NORMS),
        defaults=dict(GEMMA.defaults) | {"num_key_value_heads": 4},
    ),
    "olmo2": replace(
        LLAMA,
        block=(
            *LLAMA.block[:4],
            norm("self_attn.q_norm", "q"),
            norm("self_attn.k_norm", "kv"),
            *gated(),
            norm("post_attention_layernorm"),
            norm("post_feedforward_layernorm"),
        ),
        fused=False,
    ),
    "phi3": replace(
        LLAMA,
        block=(
            linear("self_attn.o_proj", "dim", "q"),
            linear("self_attn.qkv_proj", "qkv", "dim"),
            linear("mlp.gate_up_proj", "gate_up", "dim"),
            linear("mlp.down_proj", "dim", "inner"),
            *BOTH_NORMS,
        ),
        fused=False,
    ),
    "cohere": replace(
        LLAMA,
        block=(
            *LLAMA.block[:4],
            norm("self_attn.q_norm", "q", when="use_qk_norm"),
            norm("self_attn.k_norm", "kv", when="use_qk_norm"),
            *gated(),
            norm("input_layernorm"),
        ),
        defaults={"tie_word_embeddings": True, "logit_scale": 0.0625},
        fused=False,
    ),
    "stablelm": replace(
        LLAMA,
        block=(
            *attention("use_qkv_bias", False),
            norm("self_attn.q_layernorm", "q", when="qk_layernorm"),
            norm("self_attn.k_layernorm", "kv", when="qk_layernorm"),
            *gated(),
            layer_norm("input_layernorm"),
            layer_norm("post_attention_layernorm", when="serial"),
        ),
        after=(layer_norm("model.norm"), head("lm_head")),
        settled=lambda config: {"serial": not config.get("use_parallel_residual", False)},
        fused=False,
        norms_in_python=False,
    ),
    "starcoder2": replace(
        LLAMA,
        block=(
            *attention("use_bias", "use_bias"),
            linear("mlp.c_fc", "inner", "dim", "use_bias"),
            linear("mlp.c_proj", "dim", "inner", "use_bias"),
            layer_norm("input_layernorm"),
            layer_norm("post_attention_layernorm"),
        ),
        after=(layer_norm("model.norm"), head("lm_head")),
        defaults={"use_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2},
        fused=False,
        norms_in_python=False,
    ),
    "phi": replace(
        LLAMA,
        block=(
            *attention(True, True, "dense"),
            layer_norm("self_attn.q_layernorm", "head_dim", "qk_layernorm"),
            layer_norm("self_attn.k_layernorm", "head_dim", "qk_layernorm"),
            linear("mlp.fc1", "inner", "dim", True),
            linear("mlp.fc2", "dim", "inner", True),
            layer_norm("input_layernorm"),
        ),
        after=(layer_norm("model.final_layernorm"), head("lm_head", True)),
        defaults={"hidden_act": "gelu_new"},
        fused=False,
        norms_in_python=False,
    ),
}
