"""Quantize a base on disk, file by file, as bitsandbytes and transformers read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from veneer.checksums import SUMS, sums_of
from veneer.errors import VeneerError
from veneer.files import (
    check_writable,
    disk_errors,
    json_text,
    sync_directory,
    write_json,
    write_tensors,
    write_text,
)
from veneer.models.fingerprint import Marks
from veneer.models.quantize import (
    quantizable,
    quantizable_embedding,
    quantizable_stacks,
    quantized_weights,
)
from veneer.models.source import INDEX, Source
from veneer.models.stored import REPORT
from veneer.models.stored_names import Piece, stored_names
from veneer.quant.joined import piece_tensors
from veneer.quant.settings import Bits
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedWeight

SHARD_BYTES = 2**30
CONFIG = "config.json"
NOTES = "veneer"  # a shard's metadata of our own
VERSION = 1  # of a shard's contents: shards of other versions are written again
SHARDS = "model-*-of-*.safetensors"


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A quantized layer, or a stack of `experts`, with its error ‖W − Ŵ‖ / ‖W‖ and its size."""

    path: str
    out: int
    in_: int
    bytes: int
    error: float
    experts: int = 0

    @property
    def bits(self) -> float:
        """Bits a parameter, scales included."""
        return 8 * self.bytes / (max(1, self.experts) * self.out * self.in_)


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished file of a quantized model; `kept` if it is from an earlier try."""

    number: int
    of: int
    bytes: int
    layers: list[QuantizedLayer]
    kept: bool


def write_quantized(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    bits: Bits,
    name: str,
    pack_head: bool = False,
    pack_embedding: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Shard]:
    """Quantize a base into the directory `out`, file by file, and yield each.

    Memory holds one file at a time. After a stop, the next call goes on after the last whole file.
    config.json is written last: without it, the directory is no model. name: the base's, as it was
    asked for. Raises VeneerError if `out` holds anything else.
    """
    skeleton = source.skeleton
    _check(out)
    if pack_embedding:
        quantizable_embedding(skeleton)  # or why it cannot be
    marks, layers = Marks(skeleton), quantizable(skeleton, head=pack_head)
    order: dict[str, Any] = {
        "version": VERSION,
        "bits": bits,
        "pack_head": pack_head,
        "shard_bytes": shard_bytes,
    }
    if pack_embedding:
        order["pack_embedding"] = True
    order |= {"name": name, "files": source.identity, "config": marks.fingerprint()["config"]}
    short = {f"{path}.weight" for path in layers} | set(quantizable_stacks(skeleton))
    groups = _groups(source, short, bits, shard_bytes)
    index: dict[str, str] = {}
    total = 0
    done: list[QuantizedLayer] = []
    out.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(groups, 1):
        file = out / f"model-{number:05}-of-{len(groups):05}.safetensors"
        own = replace(source, names=tuple(names))
        notes = _notes(file, order, own)
        kept = notes is not None
        if notes is None:
            notes = _write_shard(file, own, order)
        quantized = [QuantizedLayer(**layer) for layer in notes["layers"]]
        marks.samples |= notes["samples"]
        with disk_errors(file), safe_open(file, "pt") as opened:
            index |= dict.fromkeys(opened.keys(), file.name)
        done += quantized
        total += file.stat().st_size
        yield Shard(number, len(groups), file.stat().st_size, quantized, kept)
    for file in set(out.glob(SHARDS)) - {out / name for name in index.values()}:
        file.unlink()  # of an earlier try, with other settings: `_check` has seen that it is ours
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    report = {"base": name, "bits": bits, "fingerprint": marks.fingerprint()}
    write_json(out / REPORT, report | {"layers": [asdict(layer) for layer in done]})
    with disk_errors(out):
        tokenizer.save_pretrained(out)
        skeleton.generation_config.save_pretrained(out)
        sync_directory(out)
    config = json_text(_config(skeleton, layers, bits))
    with disk_errors(out):
        sums = sums_of(out, coming={CONFIG: config})
    write_text(out / SUMS, sums)
    write_text(out / CONFIG, config)  # the last, for with it the model is there


def _write_shard(file: Path, source: Source, order: Mapping[str, Any]) -> dict[str, Any]:
    """Write one file and return the notes in its metadata."""
    tensors: dict[str, Tensor] = {}
    layers: list[QuantizedLayer] = []
    marks = Marks(source.skeleton)
    parameters = dict(source.skeleton.named_parameters())
    names = stored_names(source.skeleton) if quantizable_stacks(source.skeleton) else None
    last: list[Tensor] = []

    def see(name: str, weight: Tensor, *, expert: int | None = None) -> None:
        marks.see(name, weight, expert=expert)
        last[:] = [weight]

    for name, weight in quantized_weights(
        source,
        order["bits"],
        torch.bfloat16,
        head=order["pack_head"],
        embedding=order.get("pack_embedding", False),
        seen=see,
    ):
        if isinstance(weight, QuantizedStack):
            assert names is not None
            tensors |= _expert_tensors(weight, names.pieces(name))
            layers.append(_stack_report(name, weight, source))
            continue
        if not isinstance(weight, QuantizedWeight):
            as_it_is = weight.dtype == torch.float16 or name not in parameters
            own = names.whole.get(name, name) if names is not None else name
            tensors[own] = weight if as_it_is else weight.to(torch.bfloat16)
            continue
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.{key}": tensor for key, tensor in weight.tensors().items()}
        transposed = isinstance(source.skeleton.get_submodule(path), Conv1D)
        error = _error([_squares(last[0].T if transposed else last[0], weight)])
        out, in_ = weight.shape
        layers.append(QuantizedLayer(path, out, in_, weight.nbytes, error))
    notes = {
        "order": dict(order),
        "samples": marks.samples,
        "layers": [asdict(layer) for layer in layers],
    }
    write_tensors(file, tensors, metadata={NOTES: json.dumps(notes)})
    return notes


def _expert_tensors(stack: QuantizedStack, pieces: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
    """Return the tensors of all experts, each piece's under its own name."""
    return {
        f"{piece.name.removesuffix('.weight')}.{key}": tensor
        for expert, of_expert in zip(stack.experts, pieces, strict=True)
        for piece, tensors in zip(of_expert, piece_tensors(expert), strict=True)
        for key, tensor in tensors.items()
    }


def _stack_report(name: str, stack: QuantizedStack, source: Source) -> QuantizedLayer:
    squares = []
    for e, expert in enumerate(stack.experts):
        weight = source.expert(name, e)
        squares.append(_squares(weight.T if stack.transposed else weight, expert))
    out, in_ = stack.experts[0].shape
    return QuantizedLayer(name, out, in_, stack.nbytes, _error(squares), len(stack))


def _squares(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Return ‖W − Ŵ‖² and ‖W‖²."""
    lost = whole = 0.0
    for rows, values in quantized.blocks():  # some rows at a time, for less memory
        exact = weight[rows].to(torch.float32)
        lost += float((values - exact).square().sum())
        whole += float(exact.square().sum())
    return lost, whole


def _error(squares: Sequence[tuple[float, float]]) -> float:
    lost, whole = map(sum, zip(*squares, strict=True))
    return (lost / whole) ** 0.5 if whole else 0.0


def _notes(file: Path, order: Mapping[str, Any], source: Source) -> Any:
    """Return the notes of a whole file that the same order wrote, or None."""
    if not file.is_file():
        return None
    first, now = source.names[0], Marks(source.skeleton)
    if first in (stacks := quantizable_stacks(source.skeleton)):
        for e in range(len(stacks[first])):  # all at once would be too large
            now.see(first, source.expert(first, e), expert=e)
    else:
        now.see(first, source.read(first))
    try:
        with safe_open(file, "pt") as opened:
            notes = json.loads((opened.metadata() or {})[NOTES])
        same = notes["samples"].get(first) == now.samples.get(first)
        return notes if notes["order"] == order and same else None
    except Exception:  # any damage: the file is written again
        return None


def _groups(source: Source, quantized: set[str], bits: Bits, most: int) -> list[list[str]]:
    """Return the names of each file's weights, in order: at most `most` bytes, or one weight."""
    sizes = source.skeleton.state_dict()
    groups: list[list[str]] = [[]]
    held = 0.0
    for name in source.names:
        size = sizes[name].numel() * (bits / 8 if name in quantized else 2)
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += size
    return groups


def _config(skeleton: PreTrainedModel, quantized: Mapping[str, Any], bits: Bits) -> dict[str, Any]:
    head = skeleton.get_output_embeddings()
    whole = [path for path, m in skeleton.named_modules() if m is head and path not in quantized]
    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    config = skeleton.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    return config | {
        "architectures": [type(skeleton).__name__],
        "dtype": "bfloat16",
        "quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=whole, **how).to_dict(),
    }


def _check(out: Path) -> None:
    """Raise VeneerError if `out` holds anything but an earlier try of ours, and remove files that a
    killed process left half-written."""
    if (out / CONFIG).exists():
        raise VeneerError(f"{out} holds a model already; name another place.")
    if out.is_file() or (out.exists() and not all(map(_is_ours, out.iterdir()))):
        raise VeneerError(f"{out} holds other things; name another place.")
    check_writable(out)
    for leftover in filter(_is_half_written, out.glob(".*")):
        leftover.unlink()


def _is_ours(file: Path) -> bool:
    """Return whether a file is of an earlier try. Other programs use the same names: a shard must
    have our notes, and other files count if all shards beside them do."""
    if file.match(SHARDS):
        return _says_ours(file)
    shards = list(file.parent.glob(SHARDS))
    return _is_half_written(file) or (bool(shards) and all(map(_says_ours, shards)))


def _says_ours(shard: Path) -> bool:
    try:
        with safe_open(shard, "pt") as opened:
            return NOTES in (opened.metadata() or {})
    except Exception:  # any damage
        return False


def _is_half_written(file: Path) -> bool:
    names = ("model-", INDEX, REPORT, SUMS, CONFIG)
    # safetensors writes beside a shard, to a name of its own.
    return file.name.startswith(tuple(f".{name}" for name in names)) or bool(
        re.fullmatch(r"\.tmp\w{6}", file.name)
    )
