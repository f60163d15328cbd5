"""Architectures with skeletons of their own, most of them after GPT-2."""

from __future__ import annotations

from typing import Any

from veneer.plan.rows import (
    Architecture,
    attention,
    embedding,
    head,
    layer_norm,
    linear,
)


def _four_times(config: dict[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": config.get("intermediate_size") or 4 * config["hidden_size"]}


def _falcon(config: dict[str, Any]) -> dict[str, Any]:
    new, parallel = config["new_decoder_architecture"], config["parallel_attn"]
    own = config.get("num_ln_in_parallel_attn")
    two = parallel and (2 if own is None and new else own) == 2
    heads = config["num_attention_heads"]
    shared = (config.get("num_kv_heads") or heads) if new else 1
    return _four_times(config) | {
        "num_key_value_heads": shared if new or config["multi_query"] else heads,
        "two_parallel_norms": two,
        "one_norm": not two,
        "serial_norm": not parallel,
    }


def _opt(config: dict[str, Any]) -> dict[str, Any]:
    word_dim = config.get("word_embed_proj_dim") or config["hidden_size"]
    last = config["do_layer_norm_before"] and not config.get("_remove_final_layer_norm")
    return {
        "word_dim": word_dim,
        "projected": word_dim != config["hidden_size"],
        "last_norm": last and config["layer_norm_elementwise_affine"],
        "position_offset": 2,  # OPTLearnedPositionalEmbedding keeps two rows more
    }


GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
MINIGPT_NAMES = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "feed_forward_dim": "intermediate_size",
}

GPT_LIKE: dict[str, Architecture] = {
    "gpt2": Architecture(
        before=(embedding("transformer.wte", "words"), embedding("transformer.wpe", "positions")),
        stack="transformer.h",
        block=(
            layer_norm("ln_1"),
            linear("attn.c_attn", "qkv", "dim", True),
            linear("attn.c_proj", "dim", "q", True),
            layer_norm("ln_2"),
            linear("mlp.c_fc", "inner", "dim", True),
            linear("mlp.c_proj", "dim", "inner", True),
        ),
        after=(layer_norm("transformer.ln_f"), head("lm_head")),
        names=GPT2_NAMES,
        defaults={"tie_word_embeddings": True, "activation_function": "gelu_new"},
        settled=_four_times,
        norms_in_python=False,
    ),
    "gpt_neox": Architecture(
        before=(embedding("gpt_neox.embed_in", "words"),),
        stack="gpt_neox.layers",
        block=(
            layer_norm("input_layernorm"),
            layer_norm("post_attention_layernorm"),
            linear("attention.query_key_value", "qkv", "dim", "attention_bias"),
            linear("attention.dense", "dim", "q", "attention_bias"),
            linear("mlp.dense_h_to_4h", "inner", "dim", True),
            linear("mlp.dense_4h_to_h", "dim", "inner", True),
        ),
        after=(layer_norm("gpt_neox.final_layer_norm"), head("lm_head")),
        defaults={"attention_bias": True},
        norms_in_python=False,
    ),
    "falcon": Architecture(
        before=(embedding("transformer.word_embeddings", "words"),),
        stack="transformer.h",
        block=(
            linear("self_attention.query_key_value", "qkv", "dim", "bias"),
            linear("self_attention.dense", "dim", "q", "bias"),
            linear("mlp.dense_h_to_4h", "inner", "dim", "bias"),
            linear("mlp.dense_4h_to_h", "dim", "inner", "bias"),
            layer_norm("input_layernorm", when="one_norm"),
            layer_norm("post_attention_layernorm", when="serial_norm"),
            layer_norm("ln_attn", when="two_parallel_norms"),
            layer_norm("ln_mlp", when="two_parallel_norms"),
        ),
        after=(layer_norm("transformer.ln_f"), head("lm_head")),
        names={"ffn_hidden_size": "intermediate_size"},
        defaults={
            "tie_word_embeddings": True,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
        },
        settled=_falcon,
        norms_in_python=False,
        score_bytes=4,
    ),
    "opt": Architecture(
        before=(
            embedding("model.decoder.embed_tokens", "words", "word_dim"),
            embedding("model.decoder.embed_positions", "positions"),
            linear("model.decoder.project_out", "word_dim", "dim", when="projected"),
            linear("model.decoder.project_in", "dim", "word_dim", when="projected"),
            layer_norm("model.decoder.final_layer_norm", when="last_norm"),
        ),
        stack="model.decoder.layers",
        block=(
            *attention("enable_bias", "enable_bias", "out_proj"),
            layer_norm("self_attn_layer_norm", when="layer_norm_elementwise_affine"),
            linear("fc1", "inner", "dim", "enable_bias"),
            linear("fc2", "dim", "inner", "enable_bias"),
            layer_norm("final_layer_norm", when="layer_norm_elementwise_affine"),
        ),
        after=(head("lm_head", dim="word_dim"),),
        names={"ffn_dim": "intermediate_size"},
        defaults={
            "tie_word_embeddings": True,
            "activation_function": "relu",
            "enable_bias": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
        },
        settled=_opt,
        norms_in_python=False,
    ),
    "minigpt": Architecture(
        before=(
            embedding("model.embed_tokens", "words"),
            embedding("model.embed_positions", "positions"),
        ),
        stack="model.layers",
        block=(
            layer_norm("norm1"),
            linear("attention.q_proj", "q", "dim", True),
            linear("attention.k_proj", "kv", "dim", True),
            linear("attention.v_proj", "kv", "dim", True),
            linear("attention.o_proj", "dim", "q", True),
            layer_norm("norm2"),
            linear("linear1", "inner", "dim", True),
            linear("linear2", "dim", "inner", True),
        ),
        after=(layer_norm("model.norm"), head("lm_head")),
        names=MINIGPT_NAMES,
        defaults={"tie_word_embeddings": True},
        norms_in_python=False,
    ),
    "roberta": Architecture(
        before=(
            embedding("roberta.embeddings.word_embeddings", "words"),
            embedding("roberta.embeddings.token_type_embeddings", "token_types"),
            layer_norm("roberta.embeddings.LayerNorm"),
            embedding("roberta.embeddings.position_embeddings", "positions"),
        ),
        stack="roberta.encoder.layer",
        block=(
            linear("attention.self.query", "q", "dim", True),
            linear("attention.self.key", "q", "dim", True),
            linear("attention.self.value", "q", "dim", True),
            linear("attention.output.dense", "dim", "q", True),
            layer_norm("attention.output.LayerNorm"),
            linear("intermediate.dense", "inner", "dim", True),
            linear("output.dense", "dim", "inner", True),
            layer_norm("output.LayerNorm"),
        ),
        after=(
            linear("lm_head.dense", "dim", "dim", True),
            layer_norm("lm_head.layer_norm"),
            head("lm_head.decoder", True),
        ),
        defaults={"tie_word_embeddings": True, "type_vocab_size": 2},
        norms_in_python=False,
    ),
}
