"""A small random model of every architecture that transformers knows as a causal language model.

A configuration of usual size is made first. Every size in it, by the names that transformers uses,
is then replaced by a small one, dropout by none, and of its layers one of each kind stays. No
architecture is written down here but where its sizes depend on each other in a way of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.tiny_models import VOCAB, with_large_weights
from veneer.models.quantize import quantized_model
from veneer.models.source import Source
from veneer.quant.settings import Bits

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What people tune.
OFTEN = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("smollm3", "olmo2", "olmo3", "granite", "glm4", "gpt_neox", "gpt2", "falcon", "starcoder2"),
    *("stablelm", "cohere2", "ministral3", "seed_oss"),
)
# Settings for those that cannot be built with the usual ones of their own.
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_ROTARY = {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": _ROTARY},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
}
# Those that transformers itself does not build from settings alone, or not without a package more.
UNBUILT = {
    "dbrx": "transformers reads a setting that its own configuration drops",
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "it drafts for another model, whose states it takes",
    "musicgen": "it is built from a whole speech model's settings alone",
    "musicgen_melody": "it is built from a whole speech model's settings alone",
}

# Those of which no small model can be trained on rows of tokens.
NO_MODEL = UNBUILT | {
    "gemma4_unified_assistant": "it drafts for another model, whose states it takes",
    "reformer": "it trains only on rows of one length, which its settings say",
}

LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_blocks depth"
)
_SIZES = [
    (VOCAB, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (VOCAB, "shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab"),
    (32, "hidden_size d_model n_embd embedding_dim emb_dim embedding_size lru_width"),
    (32, "input_embedding_size output_embedding_size word_embed_proj_dim ple_embed_dim"),
    (32, "hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size"),
    (4, "hidden_size_per_layer_input laurel_rank hc_lowrank"),
    (2, LAYERS),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads"),
    (4, "num_encoder_attention_heads linear_num_value_heads linear_num_heads index_n_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (16, "head_dim swa_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim dim_head kv_channels"),
    (24, "qk_head_dim q_lora_rank"),
    (8, "qk_rope_head_dim rotary_dim sliding_window window_size kv_lora_rank o_lora_rank"),
    (48, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff d_inner"),
    (48, "dim_ff dense_intermediate_size intermediate_size_mlp block_multiple_of"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "n_group num_expert_group n_groups o_groups"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token"),
    (1, "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (24, "expert_ffn_hidden_size shared_experts_intermediate_size router_hidden_size"),
    (24, "moe_shared_expert_intermediate_size"),
    # State spaces, whose heads make twice the hidden size.
    (8, "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_d_state state_size"),
    (8, "ssm_state_size time_step_rank mamba_dt_rank"),
    (64, "mamba_d_ssm"),
    (16, "mamba_chunk_size chunk_size"),
]
SIZES: dict[str, int] = {name: size for size, names in _SIZES for name in names.split()}
# Sizes that depend on each other, or mean something else than elsewhere.
SMALL: dict[str, dict[str, Any]] = {
    "blt": {
        f"{part}_config": {"head_dim": 8} for part in ("encoder", "decoder", "global", "patcher")
    },
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"],
        **{"num_hidden_layers": 2, "n_input_layers": 0},
        **{"n_recurrent_layers": 1, "n_output_layers": 1},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "qwen4_exp": {"text_config": _INDEXER},
    "zaya": {"num_experts_per_tok": 1},
}


def usual_config(model_type: str) -> PretrainedConfig:
    """Return the configuration of a model of its usual size."""
    return CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))


def small_config(model_type: str) -> PretrainedConfig:
    usual = usual_config(model_type)
    small = SETTINGS.get(model_type, {}) | small_sizes(usual)
    for name, value in SMALL.get(model_type, {}).items():
        small[name] = small[name] | value if isinstance(value, dict) else value
    return type(usual)(**small)


def small_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Return what has to change for a configuration to be small."""
    values = config.to_dict()
    small: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small |= {name: SIZES[name] for name, value in values.items() if value and name in SIZES}
    small |= {name: 0.0 for name, value in values.items() if "drop" in name and value}
    small |= one_layer_of_each_kind(values)
    if values.get("qk_rope_head_dim"):  # latent attention: what turns of each head
        small |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": 4}
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            small[name] = small_sizes(part)
    return small


def one_layer_of_each_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers, and the lists that say something of each layer, so that one
    layer of each kind stays, and two at least."""
    count = next((values[name] for name in LAYERS.split() if name in values), None)
    lists = {
        k: v for k, v in values.items() if isinstance(v, list) and len(v) == count != len(set(v))
    }
    if not count or not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    chosen = (chosen * 2)[: max(len(chosen), 2)]
    small = {name: [v[i] for i in chosen] for name, v in lists.items()}
    return small | {name: len(chosen) for name in LAYERS.split() if values.get(name) == count}


def small_quantized(model_type: str, bits: Bits, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the random model with its linear layers quantized."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(small_config(model_type))
    return quantized_model(Source.of_model(skeleton, small(model_type)), bits, dtype)


def small(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model with weights large enough for differences to show."""
    torch.manual_seed(seed)
    config = small_config(model_type)
    model = with_large_weights(AutoModelForCausalLM.from_config(config, dtype=dtype))
    embedding = model.get_input_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and name.endswith("weight"):
                weight.add_(0.2 * torch.randn_like(weight))  # norms that differ from no norm
        if padding is not None:
            embedding.weight[padding] = 0.0  # as models are made and published
    return model
