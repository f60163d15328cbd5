"""llama.cpp's LoRA file: one GGUF with `<tensor>.lora_a` and `.lora_b` for each adapted tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, joined
from veneer.files import new_file
from veneer.formats.fold import without_start
from veneer.formats.gguf.mapping import Contents, contents_of, state_of, without_dora
from veneer.formats.gguf.names import naming_of
from veneer.formats.state import AdapterState
from veneer.models.gguf_header import is_gguf, read_header
from veneer.models.load import open_base
from veneer.quant.weight import dense

MARK, TRAINING = "veneer.base_fingerprint.", "veneer.training"  # ours, which llama.cpp ignores
INVOCATION = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
HUB = "https://huggingface.co/"
DTypes = Literal["float32", "float16"]


def detects(path: Path) -> bool:
    """Return whether a file is a GGUF adapter, by its content."""
    try:
        return is_gguf(path) and read_header(path).values.get("general.type") == "adapter"
    except (OSError, ValueError):
        return False


def base_of(path: Path) -> str:
    """Return the base that a LoRA file names: its repository on the hub, where it has one.

    llama.cpp's converter writes a title for people as the name ("Llama 3.2 1B"), and an address.
    """
    values = read_header(path).values
    address, name = (str(values.get(f"general.base_model.0.{k}", "")) for k in ("repo_url", "name"))
    return address.removeprefix(HUB) if address.startswith(HUB) else name


def read(path: Path, model_config: PretrainedConfig) -> AdapterState:
    """Read a LoRA file; the base's configuration gives the layers their paths.

    Raises AdapterError, naming the file.
    """
    try:
        return state_of(_read_contents(path), naming_of(model_config))
    except (AdapterError, OSError, ValueError, KeyError, NotImplementedError) as error:
        why = str(error).rstrip(".")
        raise AdapterError(f"The GGUF adapter {path} cannot be used: {why}.") from error


def write(
    state: AdapterState,
    path: Path,
    model_config: PretrainedConfig,
    *,
    approximate: bool = False,
    dtype: DTypes = "float32",
) -> list[str]:
    """Write a LoRA file for llama.cpp; return notes on what was folded.

    With `approximate`, a DoRA is written as the nearest plain LoRA; its base is read by the name in
    the adapter. float16 saves little, since an adapter is small, and llama.cpp then rounds the
    factors' inputs too. Raises AdapterError for what the format cannot express.
    """
    naming = naming_of(model_config)
    state, notes = without_start(state)
    if approximate and isinstance(state.config, LoRA) and state.config.dora:
        state, approximation = without_dora(state, _weights(state))
        notes += approximation
    contents = contents_of(state, naming)
    _write_contents(contents, path, dtype, state.training)
    return [*notes, *contents.notes]


def _weights(state: AdapterState) -> Callable[[str], Tensor]:
    if not state.base_name:
        raise AdapterError("This adapter does not say which base it belongs to, and DoRA needs it.")
    source, _, _ = open_base(state.base_name)
    embeddings = {layer.path for layer in state.layers() if layer.is_embedding}

    def weight_of(path: str) -> Tensor:
        weight = dense(source.read(f"{path}.weight"))
        transposed = path in embeddings or isinstance(source.skeleton.get_submodule(path), Conv1D)
        return weight.T if transposed else weight

    return weight_of


def training_of(path: Path) -> dict[str, Any]:
    """Return what a LoRA file says of its training."""
    try:
        training = json.loads(read_header(path).values.get(TRAINING, "{}"))
    except (OSError, TypeError, ValueError, RecursionError):
        return {}
    return training if isinstance(training, dict) else {}


def _write_contents(
    contents: Contents, path: Path, dtype: DTypes, training: Mapping[str, Any]
) -> None:
    stored_as = np.dtype(dtype)
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, contents.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, contents.alpha)
        kinds = gguf.LlamaFileType
        writer.add_file_type(kinds.ALL_F32 if dtype == "float32" else kinds.MOSTLY_F16)
        if contents.invocation:
            types = gguf.GGUFValueType
            writer.add_key_value(INVOCATION, [*contents.invocation], types.ARRAY, types.UINT32)
        if contents.base_name:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, contents.base_name)
        for key, mark in contents.base_fingerprint.items():
            writer.add_string(MARK + key, mark)
        if training:
            writer.add_string(TRAINING, json.dumps(dict(training)))
        for name, array in contents.tensors.items():
            with np.errstate(over="ignore"):
                short = array.astype(stored_as)
            if not np.isfinite(short).all():
                raise AdapterError(f"{name} has values that {dtype} cannot hold.")
            writer.add_tensor(name, short)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _read_contents(path: Path) -> Contents:
    values = read_header(path).values
    problems = []
    for key, needed in (("general.type", "adapter"), (gguf.Keys.Adapter.TYPE, "lora")):
        if values.get(key) != needed:
            problems.append(f"its {key} is {values.get(key)!r}, and must be {needed!r}")
    reader = gguf.GGUFReader(path)
    invocation = _invocation(reader, problems)
    alpha: Any = values.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    if not isinstance(alpha, float):
        problems.append(f"its alpha is {alpha!r}, which is no number of 32 bits")
    if problems:
        raise AdapterError(joined(problems))
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    marks = {k.removeprefix(MARK): str(v) for k, v in values.items() if k.startswith(MARK)}
    name = str(values.get("general.base_model.0.name", ""))
    architecture = str(values.get("general.architecture"))
    return Contents(architecture, alpha, tensors, name, marks, invocation)


def _invocation(reader: gguf.GGUFReader, problems: list[str]) -> tuple[int, ...]:
    """Return the ids of the tokens from which on the adapter acts, and add to `problems` what
    llama.cpp would refuse."""
    if (entry := reader.get_field(INVOCATION)) is None:
        return ()
    types = gguf.GGUFValueType
    if entry.types != [types.ARRAY, types.UINT32]:
        problems.append(f"its {INVOCATION} is no list of UINT32")
        return ()
    return tuple(map(int, entry.contents()))
