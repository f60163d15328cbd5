"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.errors import AdapterError, ConfigError
from veneer.lowrank.adapter import Adapter
from veneer.lowrank.config import LoRA
from veneer.methods.config import Method
from veneer.store import peft_virtual
from veneer.store.files import new_directory, read_json, read_tensors, write_json, write_tensors
from veneer.store.state import EMBEDDING, LINEAR, MAGNITUDE, AdapterState

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our tensor's name: how PEFT's key ends. Embeddings and magnitudes have no `.weight` there.
ENDINGS = {name: f"{name}.weight" for name in LINEAR} | {name: name for name in EMBEDDING}
ENDINGS[MAGNITUDE] = "lora_magnitude_vector"
# Parts of PEFT's LoRA that change what an adapter computes and that are not read yet.
NOT_READ = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


def config_of(state: AdapterState) -> dict[str, Any]:
    """Return what adapter_config.json says of an adapter.

    Ranks and alphas of single layers are keyed by whole paths: PEFT sorts patterns on saving, and
    the first that matches wins, so that any pattern that overlaps another could change its meaning.
    """
    if isinstance(state.config, Method):
        return peft_virtual.config_of(state, _virtual_of(state.config))
    config = state.config
    paths = [layer.path for layer in state.layers()]
    ranks = {path: config.rank_of(path) for path in paths}
    alphas = {path: _number(config.alpha_of(path)) for path in paths}
    alpha = _number(float(config.alpha or 0))
    return {
        "peft_type": "LORA",
        "task_type": state.task,
        "base_model_name_or_path": state.base_name or None,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": {path: r for path, r in ranks.items() if r != config.rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def tensors_of(state: AdapterState) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's keys.

    Raises AdapterError for an adapter with new words, whose rows this format cannot carry yet.
    """
    if state.rows is not None:
        raise AdapterError(
            "An adapter with new words cannot be written for PEFT; merge it, or write it natively."
        )
    if isinstance(state.config, Method):
        return peft_virtual.tensors_of(state, _virtual_of(state.config))
    renamed = {}
    for key, tensor in state.tensors.items():
        path, _, name = key.rpartition(".")
        renamed[f"{PREFIX}{path}.{ENDINGS[name]}"] = tensor
    return renamed


def state_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    """Return the adapter that PEFT's configuration and tensors describe.

    Raises AdapterError, listing every part that cannot be honoured and every key that is unknown.
    """
    if config.get("peft_type") in peft_virtual.TYPES:
        return peft_virtual.state_of(config, tensors)
    problems = []
    if config.get("peft_type") != "LORA":
        known = ", ".join(("LORA", *peft_virtual.TYPES))
        problems.append(f"its peft_type is {config.get('peft_type')!r}, and only {known} are read")
    problems += [f"{name} is not read" for name in NOT_READ if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, and only 'none' is read")
    found, base_weights = {}, {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        ours = next((n for n, end in ENDINGS.items() if plain.endswith(f".{end}")), None)
        if ours is not None and plain != key:
            found[plain.removesuffix(ENDINGS[ours]) + ours] = tensor
        elif plain != key and plain.endswith(".weight"):
            # PEFT saves an adapted embedding's own weight along with the adapter.
            base_weights[plain.replace(".base_layer.weight", ".weight")] = tensor
        else:
            problems.append(f"the key {key!r} is unknown")
    try:
        lora = _lora(config)
    except (ConfigError, TypeError, KeyError) as error:
        problems.append(f"adapter_config.json does not describe a LoRA ({error})")
    if problems:
        raise AdapterError("; ".join(problems))
    base = config.get("base_model_name_or_path") or ""
    return AdapterState(lora, found, base_name=str(base), base_weights=base_weights)


def without_start(state: AdapterState) -> AdapterState:
    """Return the same adapter as a plain one, of twice the rank where A and B did not start at
    zero: B A − B₀ A₀ is one product of that rank."""
    config = state.config
    if not isinstance(config, LoRA) or not any(layer.start for layer in state.layers()):
        return state
    tensors = {}
    for layer in state.layers():
        names = EMBEDDING if layer.is_embedding else LINEAR
        one = Adapter(layer.A, layer.B, scaling=1.0, start=layer.start)
        # An embedding has no start; zeros bring it to the same rank.
        A, B = (factor.detach() for factor in one.factors())
        wide = 2 * config.rank_of(layer.path) - len(A)
        tensors[f"{layer.path}.{names[0]}"] = F.pad(A, (0, 0, 0, wide))
        tensors[f"{layer.path}.{names[1]}"] = F.pad(B, (0, wide))
        if layer.magnitude is not None:
            tensors[f"{layer.path}.{MAGNITUDE}"] = layer.magnitude
    # scaling is alpha / rank, or alpha / √rank, and stays as it was.
    stronger = 2**0.5 if config.rslora else 2
    assert config.alpha is not None
    plain = replace(
        config,
        rank=2 * config.rank,
        alpha=stronger * config.alpha,
        rank_pattern={path: 2 * rank for path, rank in config.rank_pattern.items()},
        alpha_pattern={path: stronger * alpha for path, alpha in config.alpha_pattern.items()},
        init="auto",
    )
    return replace(state, config=plain, tensors=tensors)


def _virtual_of(config: Method) -> Method:
    if config.replaces_weights:
        raise AdapterError(f"PEFT has no format for {config.method}; write it natively.")
    return config


def write(state: AdapterState, directory: Path) -> None:
    """Write a directory that PEFT, and what reads its format, loads; all of it at once."""
    state = without_start(state)
    tensors, config = tensors_of(state), config_of(state)
    with new_directory(directory, marker=CONFIG) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_json(new / CONFIG, config)


def read(directory: Path) -> AdapterState:
    """Read a directory that PEFT wrote. Raises AdapterError, naming the directory."""
    config = read_json(directory / CONFIG)
    try:
        return state_of(config, read_tensors(directory / WEIGHTS))
    except AdapterError as error:
        raise AdapterError(f"The PEFT adapter in {directory} cannot be used: {error}.") from error


def _lora(config: dict[str, Any]) -> LoRA:
    wanted = config["target_modules"]
    if isinstance(wanted, str):
        # PEFT matches a string against the whole path.
        targets = ["all"] if wanted == "all-linear" else [f"re:^(?:{wanted})$"]
    else:
        targets = sorted(wanted)
    blocks = config.get("layers_to_transform")
    layers = None
    if blocks is not None:
        layers = ",".join(str(b) for b in (blocks if isinstance(blocks, list) else [blocks]))
    if config["lora_alpha"] is None:
        raise TypeError("lora_alpha is None")
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=targets,
        layers=layers,
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _number(alpha: float) -> int | float:
    # Readers such as vLLM and llama.cpp expect an integer where the alpha is one.
    return int(alpha) if float(alpha).is_integer() else alpha
