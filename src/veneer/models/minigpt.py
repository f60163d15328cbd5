"""MiniGPT: a complete language model, small enough to be trained from scratch in a minute.

A transformers causal LM like any other base: its configuration, model and tokenizer are registered
with the Auto classes, and it generates through transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg

END_OF_TEXT, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class MiniGPTConfig(PretrainedConfig):
    """The shape of a MiniGPT; `embed_dim` is divided among `num_heads` heads."""

    model_type = "minigpt"
    attribute_map = {  # noqa: RUF012 (transformers' own protocol)
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context",
        "intermediate_size": "feed_forward_dim",
    }

    vocab_size: int = 1024
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 4
    feed_forward_dim: int = 256
    context: int = 256
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    pad_token_id: int | None = 0


class MiniGPTAttention(nn.Module):
    """Multi-head causal self-attention with a projection of its own for q, k, v and o."""

    is_causal = True

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = dim // config.num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, **kwargs: Any) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        y, _ = attend(self, q, k, v, mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(y.reshape(x.shape))


class MiniGPTBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attention = MiniGPTAttention(config, layer_idx)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.linear1 = nn.Linear(config.embed_dim, config.feed_forward_dim)
        self.linear2 = nn.Linear(config.feed_forward_dim, config.embed_dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, **kwargs: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, cache, **kwargs)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class MiniGPTPreTrainedModel(PreTrainedModel):
    config_class = MiniGPTConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniGPTBlock"]  # noqa: RUF012 (transformers' own protocol)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True


class MiniGPTModel(MiniGPTPreTrainedModel):
    """The decoder: token and position embeddings, blocks, and a last norm."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_positions = nn.Embedding(config.context, config.embed_dim)
        self.layers = nn.ModuleList(MiniGPTBlock(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.post_init()

    # The name that PEFT's prefixes still use.
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        x = x + self.embed_positions(position_ids)
        for block in self.layers:
            x = block(x, mask, cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):
    """The decoder with its output head, which shares the embedding's weight."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.model = MiniGPTModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    # The name that PEFT's prefixes still use.
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        kwargs.pop("return_dict", None)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=hidden.cache)


def register() -> None:
    """Make MiniGPT known to transformers' Auto classes."""
    AutoConfig.register(MiniGPTConfig.model_type, MiniGPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniGPTConfig, MiniGPTForCausalLM, exist_ok=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on the texts; no text is ever unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the transformers tokenizer of a MiniGPT, with its chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def is_minigpt(directory: Path) -> bool:
    """Return whether a directory holds a MiniGPT, by its config.json and model.pt."""
    return all((directory / name).is_file() for name in ("config.json", "model.pt"))


def load(directory: Path) -> tuple[MiniGPTForCausalLM, PreTrainedTokenizerFast]:
    """Read a MiniGPT directory: config.json, model.pt (tensors only) and tokenizer.json."""
    config = MiniGPTConfig.from_pretrained(directory)
    model = MiniGPTForCausalLM(config)
    state = torch.load(directory / "model.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state)
    model.tie_weights()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return model.eval(), wrap_tokenizer(tokenizer)
