"""Random models of more architectures than most tests need: experts, windows, soft caps, state
spaces; and such as are no causal language models."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from support import tiny_models
from support.tiny_models import _SHAPE, VOCAB

_NAMES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "time_step_rank": 4, **_NAMES}

CAUSAL: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**_SHAPE, **_EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, **_EXPERTS, head_dim=8),
    "gpt_oss": GptOssConfig(
        **_SHAPE, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "gemma2": Gemma2Config(
        **_SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **_SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**_SHAPE, sliding_window=8),
    "granite": GraniteConfig(
        **_SHAPE,
        logits_scaling=4.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "olmo2": Olmo2Config(**_SHAPE),
    "mamba": MambaConfig(**_STATES, state_size=8),
    "mamba2": Mamba2Config(
        **_STATES, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16
    ),
    "falcon_h1": FalconH1Config(
        **_SHAPE,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=16,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.7,
    ),
}
OTHERS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        ),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=3,
        ),
    ),
}
CAUSAL_NAMES = [*tiny_models.ARCHITECTURES, *CAUSAL]


def model_of(architecture: str, *, seed: int = 0) -> Any:
    """Return a random model with weights large enough for differences to show."""
    if architecture in tiny_models.CONFIGS:
        return tiny_models.tiny(architecture, seed=seed)
    torch.manual_seed(seed)
    if architecture in CAUSAL:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CAUSAL[architecture]))
    else:
        kind, config = OTHERS[architecture]
        model = kind(copy.deepcopy(config))  # type: ignore[call-arg]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # What decays states is as random already as it may be.
            if weight.ndim > 1 and not name.endswith("A_log"):
                weight.normal_(std=0.15)
            elif name.endswith(("bias", "sinks")):
                weight.normal_(std=0.1)
    return model.eval()
