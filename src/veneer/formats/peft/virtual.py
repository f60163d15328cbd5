"""Prefix tuning and prompt tuning in PEFT's files: pure, without files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.adapter.method import Method, MethodName
from veneer.errors import AdapterError, ConfigError, joined
from veneer.formats.state import AdapterState

KEY = "prompt_embeddings"
TYPES: dict[str, MethodName] = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}


def config_of(state: AdapterState, config: Method) -> dict[str, Any]:
    """Return adapter_config.json of virtual tokens.

    For a prefix it gives the shape of the KV cache: token_dim is kv_heads · head_dim, and
    num_attention_heads is kv_heads.
    """
    common = {
        "peft_type": next(name for name, ours in TYPES.items() if ours == config.method),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": state.hub_name or None,
        "num_virtual_tokens": config.virtual_tokens,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    if config.method == "prompt":
        dim = state.tensors["prompt"].shape[1]
        return common | {"token_dim": dim, "prompt_tuning_init": "RANDOM"}
    layers, _, heads, _, head_dim = state.tensors["prefix"].shape
    return common | {
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "prefix_projection": False,
    }


def tensors_of(state: AdapterState, config: Method) -> dict[str, Tensor]:
    """Return the one tensor in PEFT's file, (virtual, numbers of each)."""
    tensor = state.tensors[config.method]
    if config.method == "prefix":
        tensor = tensor.permute(3, 0, 1, 2, 4).flatten(1)  # layer by layer, keys before values
    return {KEY: tensor.contiguous()}


def state_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    """Return the virtual tokens that PEFT's configuration and tensors describe.

    PEFT saves a prefix without the MLP that made it (prefix_projection), as we do.
    Raises AdapterError, listing every setting that cannot be honoured and every unknown key.
    """
    problems = []
    if config.get("modules_to_save"):
        problems.append("modules_to_save is not read")
    if config.get("num_transformer_submodules") not in (None, 1):
        problems.append("num_transformer_submodules is not 1, and only decoders are read")
    problems += [f"the key {key!r} is unknown" for key in tensors if key != KEY]
    method = TYPES[config["peft_type"]]
    text = config.get("prompt_tuning_init_text") if method == "prompt" else None
    settings, tensor = None, tensors.get(KEY)
    try:
        count = config["num_virtual_tokens"]
        settings = Method(method, virtual_tokens=count, prompt_text=text or None)
    except (ConfigError, KeyError) as error:
        problems.append(f"adapter_config.json does not describe virtual tokens ({error})")
    if tensor is None:
        problems.append(f"{KEY} is missing")
    elif method == "prefix":
        names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
        sizes: list[Any] = [config.get(name) for name in names]
        if tensor.ndim != 2 or not _is_whole(tensor, sizes):
            shape = ", ".join(f"{name} {size!r}" for name, size in zip(names, sizes, strict=True))
            problems.append(f"{KEY} is {tuple(tensor.shape)}, which does not agree with {shape}")
        else:
            count, layers, heads, _ = sizes
            tensor = tensor.view(count, layers, 2, heads, -1).permute(1, 2, 3, 0, 4).contiguous()
    if problems or settings is None or tensor is None:
        raise AdapterError(joined(problems))
    base = config.get("base_model_name_or_path") or ""
    return AdapterState(settings, {method: tensor}, base_name=str(base))


def _is_whole(tensor: Tensor, sizes: list[Any]) -> bool:
    """Return whether a prefix's tensor is (virtual, layers · 2 · width), of so many heads."""
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    count, layers, heads, width = sizes
    return tuple(tensor.shape) == (count, layers * 2 * width) and width % heads == 0
