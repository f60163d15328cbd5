"""Bases from GGUF files: dense weights, and a tokenizer whose ids are llama.cpp's.

Reading goes through transformers; what transformers gets wrong is put right here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import pre_tokenizers
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

from veneer.errors import ModelError


def _digits_alone() -> PreTokenizer:
    # llama.cpp's pre-tokenizer "smollm" (llama-vocab.cpp, with the pattern of GPT-2): each digit
    # stands alone before GPT-2's splitting, which transformers' GGUF reader leaves out.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


# Values of tokenizer.ggml.pre whose splitting transformers does not restore from the file.
PRE_TOKENIZERS = {"smollm": _digits_alone}


def load_config(path: Path) -> PretrainedConfig:
    """Read a GGUF file's model configuration; no weight is touched."""
    return _read(AutoConfig, path)


def load_model(path: Path, **options: Any) -> PreTrainedModel:
    """Read a GGUF file as a dense model, which can be trained and saved."""
    # Left in GGUF's blocks, the weights could be neither trained on nor saved.
    quantization = GgufConfig(dequantize=True)
    return _read(AutoModelForCausalLM, path, quantization_config=quantization, **options)


@contextmanager
def read_once() -> Iterator[None]:
    """Parse each file, and map each architecture's names, once while the context lasts.

    transformers does both anew for configuration, weights, tokenizer and every submodule; a
    vocabulary of 49 thousand words takes more than a second each time.
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
    """Read a GGUF file's tokenizer, with the splitting that `tokenizer.ggml.pre` asks for."""
    tokenizer = _read(AutoTokenizer, path)
    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.pre")
    splitting = PRE_TOKENIZERS.get(field.contents() if field else "")
    if splitting is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = splitting()
    return tokenizer


def _read(auto: Any, path: Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(str(path.parent), gguf_file=path.name, **options)
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a GGUF model ({error}). "
            "It must be a whole .gguf file of an architecture that transformers knows."
        ) from error
