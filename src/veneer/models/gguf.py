"""Bases from GGUF files: dense weights, and a tokenizer with llama.cpp's ids.

transformers reads them; its mistakes are corrected here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.errors import ModelError, listed
from veneer.models.gguf_header import check_header, read_header


def _digits_alone() -> PreTokenizer:
    # llama.cpp's pre-tokenizer "smollm" (llama-vocab.cpp) splits digits apart before GPT-2's
    # splitting; transformers' GGUF reader omits that.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


# By tokenizer.ggml.pre, splitting that transformers does not take from the file.
PRE_TOKENIZERS = {"smollm": _digits_alone}


# The widths of experts, which transformers leaves at its defaults.
EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def has_experts(path: Path) -> bool:
    """Return whether a GGUF file is of a mixture of experts, whose widths transformers mistakes."""
    return any(key.partition(".")[2] in EXPERT_WIDTHS for key in read_header(path).values)


def load_config(path: Path) -> PretrainedConfig:
    """Read a GGUF file's model configuration; no weight is touched."""
    config: PretrainedConfig = _read(AutoConfig, path)
    values = read_header(path).values
    for key, setting in EXPERT_WIDTHS.items():
        width = values.get(f"{values.get('general.architecture')}.{key}")
        if width is not None and hasattr(config, setting):
            setattr(config, setting, width)
    return config


def load_model(path: Path, **options: Any) -> PreTrainedModel:
    """Read a GGUF file as a dense model, which can be trained and saved."""
    # In GGUF's blocks, the weights could be neither trained nor saved.
    quantization = GgufConfig(dequantize=True)
    model, report = _read(
        AutoModelForCausalLM,
        path,
        quantization_config=quantization,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):  # transformers would make them up
        raise unreadable(path, ValueError(f"it lacks {listed(missing)}"))
    return model


@contextmanager
def read_once() -> Iterator[None]:
    """Within the context, parse each file and map each architecture's names only once.

    transformers does both again for configuration, weights, tokenizer and every submodule; a
    vocabulary of 49 thousand tokens takes more than a second each time.
    """
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read a GGUF file's tokenizer: its tokens, and the splitting that `tokenizer.ggml.pre` asks
    for."""
    tokenizer = _read(AutoTokenizer, path)
    _leave_out_added(tokenizer, len(field_of(path, "tokenizer.ggml.tokens")))
    splitting = PRE_TOKENIZERS.get(field_of(path, "tokenizer.ggml.pre"))
    if splitting is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = splitting()
    return tokenizer


def _leave_out_added(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Take from a tokenizer, in place, what it has beyond the file's `count` tokens.

    transformers adds the <|endoftext|> of GPT-2 where a file has none; no embedding has its row.
    """
    if len(tokenizer) <= count:
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [
        token
        for token in described["added_tokens"]
        if token["id"] < count or token["content"] in tokenizer.all_special_tokens
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))


def _read(auto: Any, path: Path, **options: Any) -> Any:
    check_header(path)
    try:
        check_consistent(path)
        # By its whole path: transformers would take a file of that name in the working directory.
        whole = str(path.resolve())
        return auto.from_pretrained(
            str(path.parent), gguf_file=whole, trust_remote_code=False, **options
        )
    except Exception as error:
        raise unreadable(path, error) from error


def check_consistent(path: Path) -> None:
    """Raise ValueError for a file that contradicts itself and could keep readers busy for ever."""
    header = read_header(path)
    architecture = header.values.get("general.architecture")
    blocks = header.values.get(f"{architecture}.block_count", 0)
    there = {match[1] for name in header.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if (
        not isinstance(blocks, int)
        or blocks > len(header.tensors)
        or (there and blocks != len(there))
    ):
        raise ValueError(f"it says {blocks} blocks, and its tensors are of {len(there)}")


def unreadable(path: Path, error: Exception) -> ModelError:
    """Return the error for a file that could not be read."""
    if "pip install" in str(error):  # transformers lacks a package
        return ModelError(f"{path} cannot be read: {error}")
    return ModelError(
        f"{path} cannot be read as a GGUF model ({error}). "
        "It must be a whole .gguf file of an architecture that transformers knows."
    )


def field_of(path: Path, name: str) -> Any:
    """Return a value of a GGUF file's header, or None."""
    field = gguf.GGUFReader(str(path)).get_field(name)
    return field.contents() if field else None
