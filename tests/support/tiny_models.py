"""Random models of many architectures, small enough to be made anew in each test."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from veneer.models import minigpt
from veneer.models.quantize import quantized_model
from veneer.models.source import Source

VOCAB = 96
_SHAPE = {
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
_ALL_HEADS = _SHAPE | {"num_key_value_heads": 4}

CONFIGS: dict[str, PretrainedConfig] = {
    "minigpt": minigpt.MiniGPTConfig(
        vocab_size=VOCAB, embed_dim=32, num_layers=2, feed_forward_dim=48, context=64
    ),
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "mistral": MistralConfig(**_SHAPE, sliding_window=8),
    "gemma": GemmaConfig(**_SHAPE, head_dim=8),
    "phi": PhiConfig(**_ALL_HEADS, resid_pdrop=0.0, attention_dropout=0.0),
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
    "gpt_neox": GPTNeoXConfig(**_ALL_HEADS),
    "falcon": FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def tiny(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a random model with weights large enough for differences to show."""
    minigpt.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture]), dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
    return model.eval()


def source(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Source:
    """Return the weights of the random model, one at a time."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture]))
    return Source.of_model(skeleton, tiny(architecture, seed=seed, dtype=dtype))


def packed(
    architecture: str, bits: int = 4, *, dtype: torch.dtype = torch.float32, head: bool = False
) -> PreTrainedModel:
    """Return the random model with its linear layers packed."""
    return quantized_model(source(architecture), bits, dtype, head=head)
