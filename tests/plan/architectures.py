"""Random models' configurations of every architecture that can be planned, and of variants."""

from transformers import (
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    StableLmConfig,
    Starcoder2Config,
)

from support.tiny_models import ALL_HEADS, CONFIGS, SHAPE, VOCAB

_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
ALL: dict[str, PretrainedConfig] = CONFIGS | {
    "gemma2": Gemma2Config(**SHAPE, head_dim=8),
    "gemma3_text": Gemma3TextConfig(**SHAPE, head_dim=8),
    "olmo2": Olmo2Config(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "granite": GraniteConfig(**SHAPE),
    "cohere": CohereConfig(**SHAPE),
    "starcoder2": Starcoder2Config(**SHAPE),
    "stablelm": StableLmConfig(**SHAPE),
    "opt": OPTConfig(**_OPT),
    "roberta": RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
    ),
}
VARIANTS: dict[str, PretrainedConfig] = {
    "llama with biases, untied": LlamaConfig(
        **SHAPE, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "phi with norms of heads": PhiConfig(**ALL_HEADS, qk_layernorm=True),
    "cohere with norms of heads": CohereConfig(**SHAPE, use_qk_norm=True),
    "stablelm 2": StableLmConfig(
        **SHAPE, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True
    ),
    "starcoder2 without biases, untied": Starcoder2Config(
        **SHAPE, use_bias=False, tie_word_embeddings=False
    ),
    "gpt2 with its own inner width": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40
    ),
    "gpt_neox without biases, tied": GPTNeoXConfig(
        **ALL_HEADS, attention_bias=False, tie_word_embeddings=True
    ),
    "falcon 40b's": FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "falcon rw's": FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "opt 350m's": OPTConfig(**_OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False),
}
