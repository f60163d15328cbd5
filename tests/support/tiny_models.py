"""Random models of many architectures, small enough to be made anew in each test: plain decoders,
such as have experts, windows, soft caps or states, and such as are no causal language models."""

import copy
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from veneer.models import minigpt
from veneer.models.quantize import quantized_model
from veneer.models.source import Source

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ALL_HEADS = SHAPE | {"num_key_value_heads": 4}

CONFIGS: dict[str, PretrainedConfig] = {
    "minigpt": minigpt.MiniGPTConfig(
        vocab_size=VOCAB, embed_dim=32, num_layers=2, feed_forward_dim=48, context=64
    ),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "phi": PhiConfig(**ALL_HEADS, resid_pdrop=0.0, attention_dropout=0.0),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**ALL_HEADS),
    "falcon": FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
_NAMES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "time_step_rank": 4, **_NAMES}

OTHER_DECODERS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **_EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **_EXPERTS, head_dim=8),
    "gpt_oss": GptOssConfig(
        **SHAPE, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "gemma2": Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**SHAPE, sliding_window=8),
    "granite": GraniteConfig(
        **SHAPE,
        logits_scaling=4.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "minicpm3": MiniCPM3Config(
        **ALL_HEADS,
        dim_model_base=16,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "olmo2": Olmo2Config(**SHAPE),
    "mamba": MambaConfig(**_STATES, state_size=8),
    "mamba2": Mamba2Config(
        **_STATES, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16
    ),
    "falcon_h1": FalconH1Config(
        **SHAPE,
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
NO_DECODERS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
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
ARCHITECTURES = sorted(CONFIGS)
CAUSAL = [*ARCHITECTURES, *OTHER_DECODERS]


def tiny(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model with weights large enough for differences to show."""
    config = _config_of(architecture).to_json_string()
    model, random_state = _tiny(architecture, seed, dtype, config)
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


def _config_of(architecture: str) -> Any:
    if architecture in NO_DECODERS:
        return NO_DECODERS[architecture][1]
    return (CONFIGS | OTHER_DECODERS)[architecture]


@cache
def _tiny(architecture: str, seed: int, dtype: torch.dtype, _: str) -> tuple[Any, torch.Tensor]:
    """Return the model, and the state of torch's generator once it is made: a copy takes half of
    the time. The last argument is the config's text, as tests change configs for a while."""
    minigpt.register()
    torch.manual_seed(seed)
    if architecture in NO_DECODERS:
        kind, config = NO_DECODERS[architecture]
        model = kind(copy.deepcopy(config)).to(dtype)  # type: ignore[call-arg]
    else:
        config = _config_of(architecture)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return with_large_weights(model), torch.get_rng_state()


@torch.no_grad()
def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the model's weights anew, and return it for evaluation."""
    for name, weight in model.named_parameters():
        # What decays states is as random already as it may be.
        if weight.ndim > 1 and not name.endswith("A_log"):
            weight.normal_(std=0.15)
        elif name.endswith(("bias", "sinks")):
            weight.normal_(std=0.1)
    return model.eval()


def source(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Source:
    """Return the weights of the random model, one at a time."""
    minigpt.register()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            copy.deepcopy((CONFIGS | OTHER_DECODERS)[architecture])
        )
    return Source.of_model(skeleton, tiny(architecture, seed=seed, dtype=dtype))


def quantized(
    architecture: str, bits: int = 4, *, dtype: torch.dtype = torch.float32, head: bool = False
) -> PreTrainedModel:
    """Return the random model with its linear layers quantized."""
    model, random_state = _quantized(architecture, bits, dtype, head)
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@cache
def _quantized(
    architecture: str, bits: int, dtype: torch.dtype, head: bool
) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return the model, and the state of torch's generator once it is made."""
    model = quantized_model(source(architecture), bits, dtype, head=head)
    return model, torch.get_rng_state()
