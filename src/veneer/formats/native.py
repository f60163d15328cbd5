"""Veneer's own adapter directory: lora_weights.pt, embedding_weights.pt, lora_config.json.

What an adapter has in the place of the base's own weights is in saved_weights.pt.

Those of other methods are named after them: freeze_weights.pt, freeze_config.json.
"""

from __future__ import annotations

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
from veneer.formats.parts import BIAS, TOKENS
from veneer.formats.state import CAUSAL, AdapterState, Rows, Tokens

ROWS = "embedding_weights.pt"
SAVED = "saved_weights.pt"
FORMAT = 1
LATER = {"dora", "lora_fa"}  # settings that came after the format; written where they are set
# Parts that came after it: earlier versions refuse what they do not know of.
LATER_PARTS = {"saved", "tokens", "parts", "task", "training"}


def config_name(method: MethodName) -> str:
    """Return the name of the file that says what an adapter of this method is."""
    return f"{method}_config.json"


def found_method(directory: Path) -> MethodName | None:
    """Return the method whose adapter a directory holds, or None if it holds none of ours."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    return next((m for m in methods if (directory / config_name(m)).is_file()), None)


def config_of(state: AdapterState) -> dict[str, Any]:
    """Return what the configuration's file says of an adapter."""
    config = asdict(state.config)
    if isinstance(state.config, LoRA):
        config["targets"] = list(config["targets"])
        for name in LATER:  # so that earlier versions read what they can
            if not config[name]:
                del config[name]
    rows = state.rows
    later: dict[str, Any] = {}
    if state.saved:
        later["saved"] = sorted(state.saved)
    if state.tokens:
        later["tokens"] = {path: list(tokens.ids) for path, tokens in state.tokens.items()}
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
        "new_words": list(rows.words) if rows else [],
        "new_words_start": rows.start if rows else None,
        **later,
    }


def state_of(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    rows: dict[str, Tensor],
    saved: dict[str, Tensor] | None = None,
) -> AdapterState:
    """Return the adapter that a configuration and its tensors describe.

    Raises AdapterError for a configuration that is of a later format, lacks something, or has
    settings that this version does not know.
    """
    if config.get("format") != FORMAT:
        raise AdapterError(
            f"its format is {config.get('format')!r}, but this version of Veneer reads {FORMAT}"
        )
    kind = Method if "method" in config else LoRA
    names = {f.name for f in fields(kind)}
    around = {"format", "veneer_version", "base", "new_words", "new_words_start"}
    unknown = sorted(set(config) - names - around - LATER_PARTS)
    missing = sorted((names | around) - set(config) - LATER)
    if unknown or missing:
        problems = [f"{key!r} is unknown{nearest(key, names)}" for key in unknown]
        problems += [f"{key!r} is missing" for key in missing]
        raise AdapterError(joined(problems))
    try:
        what = kind(**{key: config[key] for key in names if key in config})
    except (ConfigError, TypeError) as error:
        raise AdapterError(str(error)) from error
    if isinstance(what, Method) and what.method == "lora":
        raise AdapterError("its method is 'lora', but it has the settings of another")
    words, start, base = config["new_words"], config["new_words_start"], config["base"]
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), dict):
        raise AdapterError("'base' must say the base's name and fingerprint")
    new = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise AdapterError(f"'new_words' is {words!r}, but must be a list of words")
    if words or rows:
        embedding = rows.get("input_embeddings")
        if embedding is None or len(embedding) != len(words) or not isinstance(start, int):
            raise AdapterError(
                f"{ROWS} must hold one row of input_embeddings for each of {len(words)} new words"
            )
        new = Rows(tuple(words), start, embedding, rows.get("output_embeddings"))
    kept, tokens = _apart(config, saved or {})
    if not isinstance(training := config.get("training", {}), dict):
        raise AdapterError(f"'training' is {training!r}, but must be a map")
    return AdapterState(
        what,
        tensors,
        new,
        str(base.get("name", "")),
        base["fingerprint"],
        saved=kept,
        tokens=tokens,
        task=str(config.get("task", CAUSAL)),
        training=training,
    )


def _apart(
    config: dict[str, Any], saved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tokens]]:
    """Return weights in the place of the base's own, and rows of single words."""
    paths, ids = config.get("saved", []), config.get("tokens", {})
    if not isinstance(paths, list) or not isinstance(ids, dict):
        raise AdapterError("'saved' must be a list of paths, and 'tokens' a map")
    if any(not isinstance(i, list) or any(type(n) is not int for n in i) for i in ids.values()):
        raise AdapterError(f"'tokens' is {ids!r}, but must be lists of numbers")
    tokens = {
        path: Tokens(tuple(words), saved.get(f"{path}.{TOKENS}")) for path, words in ids.items()
    }
    kept = {path: tensor for path, tensor in saved.items() if not path.endswith(f".{TOKENS}")}
    if {*kept} != {*paths} or len(saved) != len(kept) + sum(
        one.rows is not None for one in tokens.values()
    ):
        raise AdapterError(f"{SAVED} does not hold what 'saved' and 'tokens' name")
    return kept, tokens


def write(
    state: AdapterState, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write an adapter directory, all of it at once."""
    method = "lora" if isinstance(state.config, LoRA) else state.config.method
    with new_directory(directory, marker=config_name(method)) as new:
        write_tensors(new / _weights_name(method), state.tensors)
        if state.rows is not None:
            rows = {"input_embeddings": state.rows.embedding}
            if state.rows.head is not None:
                rows["output_embeddings"] = state.rows.head
            write_tensors(new / ROWS, rows)
        saved = dict(state.saved) | {
            f"{path}.{TOKENS}": tokens.rows
            for path, tokens in state.tokens.items()
            if tokens.rows is not None
        }
        if saved:
            write_tensors(new / SAVED, saved)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
        write_json(new / config_name(method), config_of(state))


def read(directory: Path, method: MethodName) -> AdapterState:
    """Read an adapter directory. Raises AdapterError, naming the directory."""
    config = read_json(directory / config_name(method))
    tensors = read_tensors(directory / _weights_name(method))
    rows, saved = (
        read_tensors(directory / name) if (directory / name).exists() else {}
        for name in (ROWS, SAVED)
    )
    try:
        return state_of(config, tensors, rows, saved)
    except AdapterError as error:
        why = shortened(str(error), 20_000)
        raise AdapterError(f"The adapter in {directory} cannot be used: {why}.") from error


def _weights_name(method: MethodName) -> str:
    return f"{method}_weights.pt"
