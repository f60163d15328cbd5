"""Veneer's own adapter directory: lora_weights.pt, embedding_weights.pt, lora_config.json.

saved_weights.pt holds modules to save, trained biases and rows of trained tokens. Other methods'
files are named after the method: freeze_weights.pt, freeze_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method, MethodName
from veneer.errors import AdapterError, ConfigError, joined, nearest, shortened
from veneer.files import new_directory, read_json, read_tensors, write_json, write_tensors
from veneer.formats.state import BIAS, CAUSAL, AdapterState, NewTokenRows, StoredTokens

ROWS = "embedding_weights.pt"
SAVED = "saved_weights.pt"
TOKEN_ROWS = ".token_rows"  # behind the path of embedding or head
FORMAT = 1
# Settings that are younger than the format; written if they are set.
LATER = {"dora", "lora_fa", "invocation", "expert_rank", "shared_expert_a"}
# Keys that are younger than the format; earlier versions refuse unknown keys.
LATER_KEYS = {"saved", "tokens", "parts", "task", "training"}


def config_name(method: MethodName) -> str:
    """Return the name of the file with the settings of an adapter of this method."""
    return f"{method}_config.json"


def method_in(directory: Path) -> MethodName | None:
    """Return the method of the adapter in a directory, or None if there is none of ours."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    return next((m for m in methods if (directory / config_name(m)).is_file()), None)


def method_of(state: AdapterState) -> MethodName:
    """Return the method by which an adapter was trained."""
    return "lora" if isinstance(state.config, LoRA) else state.config.method


def config_of(state: AdapterState) -> dict[str, Any]:
    """Return the configuration of an adapter, as its file has it."""
    config = asdict(state.config)
    if isinstance(state.config, LoRA):
        config["targets"] = list(config["targets"])
        for name in LATER:  # for earlier versions, which refuse unknown settings
            if not config[name]:
                del config[name]
    new = state.new_tokens
    later: dict[str, Any] = {}
    if state.modules_to_save:
        later["saved"] = sorted(state.modules_to_save)
    if state.trained_tokens:
        later["tokens"] = {path: list(tokens.ids) for path, tokens in state.trained_tokens.items()}
    if any(layer.bias is not None for layer in state.layers()):
        later["parts"] = [BIAS]
    if state.task != CAUSAL:
        later["task"] = state.task
    if state.training:
        later["training"] = dict(state.training)
    return {
        "format": FORMAT,
        "veneer_version": version("veneer"),
        **config,
        "base": {"name": state.base_name, "fingerprint": dict(state.base_fingerprint)},
        "new_words": list(new.tokens) if new else [],
        "new_words_start": new.start if new else None,
        **later,
    }


def state_of(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    rows: dict[str, Tensor],
    saved: dict[str, Tensor] | None = None,
) -> AdapterState:
    """Return the adapter that a configuration and its tensors describe.

    Raises AdapterError for a later format, missing keys, and settings unknown to this version.
    """
    if config.get("format") != FORMAT:
        raise AdapterError(
            f"its format is {config.get('format')!r}, but this version of Veneer reads {FORMAT}"
        )
    kind = Method if "method" in config else LoRA
    names = {f.name for f in fields(kind)}
    around = {"format", "veneer_version", "base", "new_words", "new_words_start"}
    unknown = sorted(set(config) - names - around - LATER_KEYS)
    missing = sorted((names | around) - set(config) - LATER)
    if unknown or missing:
        problems = [f"{key!r} is unknown{nearest(key, names)}" for key in unknown]
        problems += [f"{key!r} is missing" for key in missing]
        raise AdapterError(joined(problems))
    try:
        settings = kind(**{key: config[key] for key in names if key in config})
    except (ConfigError, TypeError) as error:
        raise AdapterError(str(error)) from error
    if isinstance(settings, Method) and settings.method == "lora":
        raise AdapterError("its method is 'lora', but its settings are those of another method")
    base = config["base"]
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), dict):
        raise AdapterError("'base' must say the base's name and fingerprint")
    modules_to_save, trained_tokens = _saved(config, saved or {})
    return AdapterState(
        settings,
        tensors,
        _new_tokens(config["new_words"], config["new_words_start"], rows),
        str(base.get("name", "")),
        base["fingerprint"],
        modules_to_save=modules_to_save,
        trained_tokens=trained_tokens,
        task=str(config.get("task", CAUSAL)),
        training=training_in(config),
    )


def state_of_files(config: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> AdapterState:
    """Return the adapter that a configuration and the tensors of each file describe."""
    weights = files[_weights_name(config.get("method", "lora"))]
    return state_of(config, weights, files.get(ROWS, {}), files.get(SAVED, {}))


def config_in(directory: Path) -> dict[str, Any] | None:
    """Return the configuration of the adapter in a directory, or None if there is none of ours."""
    method = method_in(directory)
    return None if method is None else read_json(directory / config_name(method))


def base_in(config: dict[str, Any]) -> str:
    """Return the name of the base in an adapter's configuration, or nothing."""
    base = config.get("base")
    return str(base.get("name") or "") if isinstance(base, dict) else ""


def training_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an adapter's configuration says of its training."""
    if not isinstance(training := config.get("training", {}), dict):
        raise AdapterError(f"'training' is {training!r}, but must be a map")
    return training


def _new_tokens(tokens: object, start: object, rows: dict[str, Tensor]) -> NewTokenRows | None:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise AdapterError(f"'new_words' is {tokens!r}, but must be a list of words")
    if not tokens and not rows:
        return None
    embedding = rows.get("input_embeddings")
    if embedding is None or len(embedding) != len(tokens) or not isinstance(start, int):
        raise AdapterError(
            f"{ROWS} must hold one row of input_embeddings for each of {len(tokens)} new tokens"
        )
    return NewTokenRows(tuple(tokens), start, embedding, rows.get("output_embeddings"))


def _saved(
    config: dict[str, Any], saved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, StoredTokens]]:
    """Return the modules_to_save and the trained tokens in SAVED."""
    paths, ids = config.get("saved", []), config.get("tokens", {})
    if not isinstance(paths, list) or not isinstance(ids, dict):
        raise AdapterError("'saved' must be a list of paths, and 'tokens' a map")
    if any(not isinstance(i, list) or any(type(n) is not int for n in i) for i in ids.values()):
        raise AdapterError(f"'tokens' is {ids!r}, but must be lists of numbers")
    trained_tokens = {
        path: StoredTokens(tuple(own), saved.get(path + TOKEN_ROWS)) for path, own in ids.items()
    }
    modules_to_save = {path: t for path, t in saved.items() if not path.endswith(TOKEN_ROWS)}
    with_rows = sum(tokens.rows is not None for tokens in trained_tokens.values())
    if {*modules_to_save} != {*paths} or len(saved) != len(modules_to_save) + with_rows:
        raise AdapterError(f"{SAVED} does not hold what 'saved' and 'tokens' name")
    return modules_to_save, trained_tokens


def tensors_of(state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of an adapter, by the file's name."""
    files = {_weights_name(method_of(state)): state.tensors}
    if (new_tokens := state.new_tokens) is not None:
        files[ROWS] = {"input_embeddings": new_tokens.embedding}
        if new_tokens.head is not None:
            files[ROWS]["output_embeddings"] = new_tokens.head
    saved = dict(state.modules_to_save) | {
        path + TOKEN_ROWS: tokens.rows
        for path, tokens in state.trained_tokens.items()
        if tokens.rows is not None
    }
    return files | ({SAVED: saved} if saved else {})


def write(
    state: AdapterState, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write an adapter directory, all of it at once."""
    method = method_of(state)
    with new_directory(directory, marker=config_name(method)) as new:
        for name, tensors in tensors_of(state).items():
            write_tensors(new / name, tensors)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
        write_json(new / config_name(method), config_of(state))


def read(directory: Path, method: MethodName, *, shapes_only: bool = False) -> AdapterState:
    """Read an adapter directory; with `shapes_only`, no values.

    Raises AdapterError, naming the directory.
    """
    config = read_json(directory / config_name(method))
    tensors = read_tensors(directory / _weights_name(method), shapes_only=shapes_only)
    rows, saved = (
        read_tensors(directory / name, shapes_only=shapes_only)
        if (directory / name).exists()
        else {}
        for name in (ROWS, SAVED)
    )
    try:
        return state_of(config, tensors, rows, saved)
    except AdapterError as error:
        why = shortened(str(error), 20_000)
        raise AdapterError(f"The adapter in {directory} cannot be used: {why}.") from error


def _weights_name(method: MethodName) -> str:
    return f"{method}_weights.pt"
