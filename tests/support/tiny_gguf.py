"""Random models as GGUF files, written as llama.cpp's converter would, and without our own code."""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCAB = 96
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Settings that transformers assumes for some architectures instead of reading them from the file.
_GEMMA = _SHAPE | {"head_dim": 256}
_NO_DROPOUT = {"resid_pdrop": 0.0, "attention_dropout": 0.0, "embd_pdrop": 0.0}
# llama.cpp's name of the architecture, and a configuration.
CONFIGS: dict[str, tuple[str, PretrainedConfig]] = {
    "llama": ("llama", LlamaConfig(**_SHAPE)),
    "llama, tied": ("llama", LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
    "mistral": ("llama", MistralConfig(**_SHAPE, sliding_window=None)),
    "qwen2": ("qwen2", Qwen2Config(**_SHAPE)),
    "qwen3": ("qwen3", Qwen3Config(**_SHAPE, head_dim=128)),
    "smollm3": ("smollm3", SmolLM3Config(**_SHAPE | {"num_hidden_layers": 4})),
    "gemma": ("gemma", GemmaConfig(**_GEMMA)),
    "gemma2": ("gemma2", Gemma2Config(**_GEMMA, query_pre_attn_scalar=256)),
    "gemma3": ("gemma3", Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=256)),
    "phi": ("phi2", PhiConfig(**_SHAPE | {"num_key_value_heads": 4}, **_NO_DROPOUT)),
    "phi3": ("phi3", Phi3Config(**_SHAPE, **_NO_DROPOUT)),
    "gpt2": (
        "gpt2",
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=1024,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
    ),
}

_EXPERTS = _SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OLMOE = _SHAPE | {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
_GPT_OSS = _SHAPE | {
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 8},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
MIXTURES: dict[str, tuple[str, PretrainedConfig]] = {
    "qwen2_moe": ("qwen2moe", Qwen2MoeConfig(**_EXPERTS, shared_expert_intermediate_size=64)),
    "qwen3_moe": ("qwen3moe", Qwen3MoeConfig(**_EXPERTS, head_dim=128, norm_topk_prob=True)),
    "olmoe": ("olmoe", OlmoeConfig(**_OLMOE)),
    "gpt_oss": ("gpt-oss", GptOssConfig(**_GPT_OSS)),
    "mixtral": ("llama", MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}
EVERY = CONFIGS | MIXTURES


def random_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(EVERY[name][1]), dtype=torch.float32)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
            elif path.endswith("bias"):
                weight.normal_(std=0.1)
    return model.eval()


def write_model(
    name: str, model: PreTrainedModel, path: Path, *, kind: str = "F32", rows: int | None = None
) -> Path:
    """Write a model as GGUF, its matrices as `kind`."""
    architecture, config = EVERY[name][0], model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, architecture, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<pad>", "<s>", "</s>", "Ġ", *map(chr, range(33, 33 + VOCAB - 4))]
    writer.add_token_list(tokens)
    types = gguf.TokenType
    writer.add_token_types([types.CONTROL] * 3 + [types.NORMAL] * (VOCAB - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    matrix_kind = gguf.GGMLQuantizationType[kind]
    for tensor, weight in tensors_of(name, model).items():
        matrix = weight.ndim > 1 and "position" not in tensor and "gate_inp" not in tensor
        as_kind = matrix_kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor, gguf.quantize(weight, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(name: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return a model's weights under llama.cpp's names and in its order of rows."""
    architecture, config = EVERY[name][0], model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for path, parameter in _apart(model).items():  # a tied head is not named again
        tensor = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert tensor is not None, path
        weight = parameter.numpy()
        if architecture in ("llama", "smollm3") and ".attn_q." in tensor:
            weight = in_pairs(weight, config.num_attention_heads)
        if architecture in ("llama", "smollm3") and ".attn_k." in tensor:
            weight = in_pairs(weight, config.num_key_value_heads)
        if architecture == "gpt2" and weight.ndim == 2 and "embd" not in tensor:
            weight = weight.T  # Conv1D
        if architecture.startswith("gemma") and tensor.endswith("norm.weight"):
            weight = weight + 1
        if tensor.endswith("ffn_gate_inp_shexp.weight"):
            weight = weight[0]
        tensors[tensor] = np.ascontiguousarray(weight)
    return tensors


def _apart(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's parameters, of which gate and up of experts are apart."""
    parameters = {}
    for path, parameter in model.named_parameters():
        weight = parameter.detach()
        owner, _, leaf = path.rpartition(".")
        is_gpt_oss = model.config.model_type == "gpt_oss"
        leaf = leaf.removesuffix("_bias")
        end = "bias" if path.endswith("proj_bias") else "weight"
        if weight.ndim == 3 and is_gpt_oss:  # (experts, in, out), with gate and up in turn
            weight = weight.transpose(1, 2).contiguous()
        if leaf == "gate_up_proj" and "experts" in owner:
            halves = (weight[:, 0::2], weight[:, 1::2]) if is_gpt_oss else weight.chunk(2, dim=1)
            for name, half in zip(("gate_proj", "up_proj"), halves, strict=True):
                parameters[f"{owner}.{name}.{end}"] = half
        elif leaf == "down_proj" and "experts" in owner.rpartition(".")[2]:
            parameters[f"{owner}.{leaf}.{end}"] = weight
        elif leaf == "sinks":
            parameters[f"{path}.weight"] = weight
        else:
            parameters[path] = weight
    return parameters


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows with those side by side that rotary embeddings rotate together."""
    width = len(rows) // heads
    order = [
        head * width + half * width // 2 + i
        for head in range(heads)
        for i in range(width // 2)
        for half in (0, 1)
    ]
    return rows[order]


def _add_settings(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    if experts := getattr(config, "num_experts", getattr(config, "num_local_experts", 0)):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if experts and architecture not in ("llama", "olmoe"):
        inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
        writer.add_expert_feed_forward_length(inner)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_key_length(width)
    writer.add_value_length(width)
    theta = config.rope_parameters
    theta = theta.get("full_attention", theta)["rope_theta"]
    writer.add_rope_freq_base(theta)
    if architecture == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(width // 2)
        return
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window)
