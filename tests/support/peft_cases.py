"""A case for everything in PEFT's LoRA: the base, PEFT's settings, and the models of both."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GptOssConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    ViTConfig,
    ViTForImageClassification,
)

from support.random_adapters import ids
from support.tiny_models import CONFIGS, VOCAB, tiny
from veneer.adapter.adapter import Adapter
from veneer.adapter.tokens import TrainedTokens
from veneer.formats.capture import layer_tensors, modules_to_save_of, trained_tokens_of

_MOE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _shaken(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or name.endswith("bias"):
                weight.normal_(std=0.15)
    return model.eval()


def base(kind: str) -> PreTrainedModel:
    """Return the random base of a case, the same each time."""
    torch.manual_seed(3)
    match kind:
        case "mixtral":
            config = MixtralConfig(**_MOE, intermediate_size=24, num_local_experts=4)
            return _shaken(AutoModelForCausalLM.from_config(config))
        case "qwen3_moe":
            config = Qwen3MoeConfig(
                **_MOE, head_dim=8, intermediate_size=24, moe_intermediate_size=16, num_experts=4
            )
            return _shaken(AutoModelForCausalLM.from_config(config))
        case "gpt_oss":  # whose experts are (experts, in, out), and have biases
            config = GptOssConfig(
                **_MOE, head_dim=8, intermediate_size=24, num_local_experts=4, sliding_window=8
            )
            return _shaken(AutoModelForCausalLM.from_config(config))
        case "vit":
            vit = ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=16,
                patch_size=4,
                num_labels=5,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            return _shaken(ViTForImageClassification(vit))
        case "convnext":  # a stem whose windows do not overlap, and others whose groups are many
            sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
            return _shaken(ConvNextForImageClassification(ConvNextConfig(**sizes, image_size=16)))
        case "classifier":
            config = type(CONFIGS["llama"])(**CONFIGS["llama"].to_dict())
            config.num_labels = 3
            return _shaken(LlamaForSequenceClassification(config))
    return tiny(kind)


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Return what a case's base is given."""
    if kind in ("vit", "convnext"):
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    return {"input_ids": ids()}


def logits(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return _logits(model, kind)


def loss(model: nn.Module, kind: str) -> Tensor:
    rows = _logits(model, kind).flatten(0, -2)
    labels = torch.arange(len(rows)) % rows.shape[-1]
    return nn.functional.cross_entropy(rows, labels)


def _logits(model: nn.Module, kind: str) -> Tensor:
    dtype = next(weight.dtype for weight in model.parameters())
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs_of(kind).items()}
    return model(**inputs).logits


def theirs(kind: str, options: Mapping[str, Any], *, trains: bool = False) -> peft.PeftModel:
    """Return PEFT's model with random values in everything that trains."""
    task = "CAUSAL_LM" if kind not in ("vit", "convnext", "classifier") else None
    config = {"task_type": task, "r": 4, "lora_alpha": 12} | dict(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(kind), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def written(model: peft.PeftModel, place: Path, **options: Any) -> None:
    model.create_or_update_model_card = lambda place: None  # which takes longer than all else
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(place, **options)


def opened(kind: str, place: Path, **options: Any) -> peft.PeftModel:
    """Return PEFT's model over a fresh base, with the adapter in `place`."""
    with warnings.catch_warnings():
        # All that PEFT says of keys that it does not find.
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not found)")
        model = peft.PeftModel.from_pretrained(base(kind), place, **options)
    return model.eval()


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's live tensors."""
    tensors: dict[str, Any] = layer_tensors(model, "default") | modules_to_save_of(model, "default")
    return tensors | {
        f"{p}.rows": tokens.rows for p, tokens in trained_tokens_of(model, "default").items()
    }


def train_adapter(model: nn.Module) -> None:
    """Let the adapter's tensors train, and nothing else."""
    for module in model.modules():
        if isinstance(module, Adapter | TrainedTokens):
            module.requires_grad_(True)
    for weight in modules_to_save_of(model, "default").values():
        weight.requires_grad_(True)


# Tokens of the text, so that their rows in the embedding have a gradient.
SEEN = ids().flatten().unique().tolist()
SEEN_LAST = ids()[0, 4:6].tolist()  # in the middle of a row, and in no other
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# The base, and the settings of PEFT.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, tied": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding and head as one": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "embedding alone": ("gpt_neox", {"target_modules": ["embed_in"]}),
    "head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "head, tied": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "minigpt": ("minigpt", {"target_modules": ["q_proj", "linear1", "embed_tokens"]}),
    "gaussian": ("phi", {"target_modules": ["dense"], "init_lora_weights": "gaussian"}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "regex": ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.gate_proj)"}),
    "regex of ends": ("llama", {"target_modules": r".*q_proj|.*o_proj"}),
    "all-linear": ("falcon", {"target_modules": "all-linear"}),
    "all-linear, Conv1D": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "positions": ("gpt2", {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Conv2d": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "Conv2d, DoRA": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "Conv2d, stem and pointwise": (
        "convnext",
        {"target_modules": r".*(patch_embeddings|downsampling_layer\.1|pwconv1)"},
    ),
    "DoRA": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA, embedding and Conv1D": (
        "gpt2",
        {"target_modules": ["wte", "c_attn"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "activated": (
        "qwen2",
        {"target_modules": ["q_proj", "down_proj"], "alora_invocation_tokens": SEEN_LAST},
    ),
    "rsLoRA": ("mistral", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "k_proj": 9},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "up_proj": 5.5},
        },
    ),
    "patterns, the first wins": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 6, "q_proj": 2},
            "alpha_pattern": {".*v_proj": 5, "layers.1.self_attn.v_proj": 30},
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": 0, "fan_in_fan_out": True},
    ),
    "layers by pattern": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": "h"},
    ),
    "layers by patterns": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": ["blocks", "layers"],
        },
    ),
    "exclude": ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]}),
    "exclude paths": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "exclude_modules": ["layers.0.mlp.up_proj", "1.self_attn.q_proj"],
        },
    ),
    "exclude by regex": (
        "llama",
        {"target_modules": r".*\.(q|up)_proj", "exclude_modules": r".*\.0\..*"},
    ),
    "exclude from all": (
        "qwen3",
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ),
    "bias all": ("phi", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "bias all, Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "bias all, none there": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "bias with DoRA": (
        "qwen2",
        {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    ),
    "bias, Conv2d": ("vit", {"target_modules": ["projection"], "bias": "all"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "lora_bias alone": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "use_rslora": True},
    ),
    "lora_bias, Conv2d": ("vit", {"target_modules": ["projection"], "lora_bias": True}),
    "both biases": (
        "qwen2",
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"},
    ),
    "saved head": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved head, tied": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved as one": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "saved norms and an mlp": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm", "1.mlp"]},
    ),
    "saved classifier": ("vit", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
    "saved classifier, by its task": (
        "classifier",
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "saved and biases": (
        "gpt_neox",
        {
            "target_modules": ["query_key_value"],
            "modules_to_save": ["dense_4h_to_h"],
            "bias": "all",
        },
    ),
    "tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": SEEN[:3]}),
    "tokens, tied": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17]}),
    "tokens, scaled": ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 4]}),
    "tokens of both": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": SEEN[1:3], "lm_head": [5]},
        },
    ),
    "tokens of both, tied": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [3, 17]},
        },
    ),
    "tokens of both, tied no more": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": SEEN[1:3], "lm_head": [5, 17]},
        },
    ),
    "tokens of padding": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 17]},
    ),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts alone": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True},
    ),
    "one stack of experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    "experts by patterns": (
        "mixtral",
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {r".*\.down_proj": 2},
            "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
        },
    ),
    "experts, transposed": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "router": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}),
    "all at once": (
        "qwen2",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "exclude_modules": ["layers.0.self_attn.v_proj"],
            "modules_to_save": ["norm"],
            "bias": "lora_only",
            "lora_bias": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "trainable_token_indices": SEEN[4:6],
        },
    ),
}
