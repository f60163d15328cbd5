"""A plain transformers model as a GGUF file: by llama.cpp's own converter, or written here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from veneer.errors import ModelError, joined
from veneer.files import new_file
from veneer.formats.gguf.names import ARCHITECTURES, kind_of, permuted, permuted_heads
from veneer.formats.gguf.vocabulary import add_vocabulary, vocabulary_notes, vocabulary_problems
from veneer.models.end_tokens import end_tokens
from veneer.models.load import load_config, open_base
from veneer.models.locate import locate
from veneer.models.source import Source

Kind = GGMLQuantizationType
KINDS = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
SCRIPT, VARIABLE = "convert_hf_to_gguf.py", "VENEER_LLAMA_CPP"
# Architectures whose files, written here, give our own log probabilities in llama.cpp (a test).
WRITTEN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# What llama.cpp takes for granted of them; a setting that a configuration lacks is as here.
SETTINGS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}


def write_plain(name: str | Path, out: Path, *, kind: str | None = None) -> list[str]:
    """Write a model as the GGUF file `out` and return notes on it.

    kind: the type of matrices, of KINDS; by default as the model's files have them. llama.cpp's
    converter does it where it is installed, for a directory. Raises ModelError for a model that
    Veneer cannot write and for what the converter refuses.
    """
    script = check_plain(name, out, kind=kind)
    kind = kind and kind.lower()
    if script is not None:
        _by_llama_cpp(script, Path(locate(name)), out, kind)
        return [f"Converted by llama.cpp's own {script}."]
    source, tokenizer, notes = open_base(name)
    matrix = next(name for name in source.names if name.endswith("embed_tokens.weight"))
    stored = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kind = kind or stored[source.read(matrix).dtype]
    rows = int(source.skeleton.get_parameter(matrix).shape[0])
    problems = [*vocabulary_problems(tokenizer, rows), *_weight_problems(source, kind)]
    if problems:
        raise _refusal(problems, name, out, kind)
    with new_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[source.skeleton.config.model_type])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(name).name)
        _add_settings(writer, source.skeleton.config, kind)
        add_vocabulary(writer, tokenizer, rows, end_tokens(source.skeleton))
        _write_weights(writer, source, KINDS[kind][0])
        writer.close()
    return [*notes, *vocabulary_notes(tokenizer)]


def check_plain(name: str | Path, out: Path, *, kind: str | None = None) -> Path | None:
    """Return llama.cpp's converter if it will write the model, None if Veneer will.

    Raises ModelError where a look at the configuration says that neither can.
    """
    if kind is not None and kind.lower() not in KINDS:
        raise ModelError(f"A model is not written as {kind!r}, but as {', '.join(KINDS)}.")
    place, script, config = locate(name), converter(), load_config(name)
    if isinstance(place, Path) and place.is_file():
        raise ModelError(f"{name} is a GGUF file already.")
    if script is not None and isinstance(place, Path) and config.model_type != "minigpt":
        return script
    if problems := list(_config_problems(config)):
        raise _refusal(problems, name, out, kind)
    return None


def _refusal(problems: Sequence[str], name: str | Path, out: Path, kind: str | None) -> ModelError:
    command = f"python {SCRIPT} {name} --outfile {out}" + (f" --outtype {kind}" if kind else "")
    return ModelError(
        f"Veneer cannot write {name} as GGUF: {joined(problems)}. llama.cpp's own converter may be "
        f"able to: {command}. Veneer calls it where it is on the PATH or {VARIABLE} names it."
    )


def converter() -> Path | None:
    """Return llama.cpp's converter: VENEER_LLAMA_CPP, which is the script or its directory, or
    the one on the PATH. Raises ModelError where the variable names none."""
    if text := os.environ.get(VARIABLE):
        path = Path(text).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise ModelError(f"{VARIABLE} is {text}, but there is no {SCRIPT}.")
        return path
    script = shutil.which(SCRIPT)
    return Path(script) if script else None


def _by_llama_cpp(script: Path, directory: Path, out: Path, kind: str | None) -> None:
    if code := sorted(directory.glob("*.py")):
        raise ModelError(
            f"{directory} brings code along ({code[0].name}), which llama.cpp's converter may run, "
            "and Veneer runs no such code. Take it out, or call the converter yourself."
        )
    with new_file(out) as temporary:
        arguments = map(str, (script, directory, "--outfile", temporary))
        done = subprocess.run(
            [sys.executable, *arguments, "--outtype", kind or "auto"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not temporary.stat().st_size:
            lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
            raise ModelError(f"{script} cannot convert {directory}: {lines[-1]}")


def _config_problems(config: PretrainedConfig) -> Iterator[str]:
    """Yield what in a configuration is not proven to be the same in llama.cpp."""
    if config.model_type not in WRITTEN:
        yield f"it writes {', '.join(WRITTEN)}, and this is {config.model_type}"
        return
    rope = getattr(config, "rope_parameters", None) or {}
    settings = {**rope, **config.to_dict()}
    for key, usual in SETTINGS.items():
        if settings.get(key) not in (usual, None):
            yield f"{key} is {settings[key]!r}"
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        yield f"rope_type is {rope['rope_type']!r}"
    # llama.cpp's smollm3 leaves every fourth layer without positions.
    pattern = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if config.model_type == "smollm3" and list(config.no_rope_layers) != pattern:
        yield f"no_rope_layers is {config.no_rope_layers!r}"


def _weight_problems(source: Source, kind: str) -> Iterator[str]:
    names = _tensor_names(source)
    if unnamed := [name for name in source.names if name not in names]:
        yield f"GGUF has no tensor for {', '.join(unnamed)}"
    block = gguf.GGML_QUANT_SIZES[KINDS[kind][0]][0]
    widths = {weight.shape[-1] for weight in source.skeleton.parameters() if weight.ndim == 2}
    if odd := sorted(width for width in widths if width % block):
        yield f"rows of {odd[0]:,} numbers are no whole blocks of {kind}; take f16"


def _tensor_names(source: Source) -> dict[str, str]:
    config = source.skeleton.config
    names = gguf.get_tensor_name_map(kind_of(config.model_type), config.num_hidden_layers)
    tensors = {name: names.get_name(name, (".weight", ".bias")) for name in source.names}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _add_settings(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(KINDS[kind][1])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_weights(writer: gguf.GGUFWriter, source: Source, kind: Kind) -> None:
    """Write matrices as `kind` and all else as float32; memory holds one tensor at a time."""
    config: Any = source.skeleton.config
    shapes = source.skeleton.state_dict()
    names = _tensor_names(source)
    kinds = {name: kind if shapes[name].ndim == 2 else Kind.F32 for name in source.names}
    for name in source.names:
        shape = gguf.quant_shape_to_byte_shape(tuple(shapes[name].shape), kinds[name])
        size = int(np.prod(shape))
        writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), size, kinds[name])
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = permuted_heads(config)
    for name in source.names:
        layer = names[name].split(".")[-2]
        weight = permuted(source.read(name).to(torch.float32), heads.get(layer, 0))
        with np.errstate(over="ignore"):
            stored = gguf.quantize(weight.contiguous().numpy(), kinds[name])
        if kinds[name] == Kind.F16 and not np.isfinite(stored.view(np.float16)).all():
            raise ModelError(
                f"{name} has numbers that float16 cannot hold; take bf16 or f32 (--gguf-type)."
            )
        writer.write_tensor_data(stored)
    if factors is not None:
        writer.write_tensor_data(factors)


def _rope_factors(config: Any) -> np.ndarray | None:
    """Return what llama.cpp divides each frequency by: θ⁻²ⁱᐟᵈ / the frequency, for Llama 3."""
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    halves = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    plain = 1 / config.rope_parameters["rope_theta"] ** halves
    return np.asarray((plain / frequencies).numpy(), dtype=np.float32)
