"""Load bases that `veneer quantize` or bitsandbytes stored quantized."""

from __future__ import annotations

import json
import mmap
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import ModelError, listed
from veneer.models.assemble import AnyWeight, assemble
from veneer.models.block_buffers import passes_of
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.models.quantize import quantizable_stacks
from veneer.models.source import model_files
from veneer.models.stored_names import Piece, stored_names
from veneer.quant.joined import joined
from veneer.quant.mapped import ReadAhead, map_tensors
from veneer.quant.stack import LazyExperts, QuantizedStack, quantized_stacks
from veneer.quant.weight import QuantizedWeight, dense, quantized_layers

# Tensors that bitsandbytes stores beside a quantized weight.
BESIDE = re.compile(r"(?P<path>.+)\.(?P<key>weight\..+|SCB|weight_format)")
REPORT = "veneer.json"  # beside config.json: the base's name and fingerprint, and the errors


def load_quantized(
    directory: Path,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> PreTrainedModel:
    """Return the quantized model of a directory; its large tensors stay in their files, unless
    they go to an accelerator.

    Layers are read ahead, forwards or backwards as they are used. With a world of several processes
    each reads its shards into memory instead. Raises ModelError for damage.
    """
    stored: dict[str, Tensor] = {}
    for file in model_files(directory):
        try:
            stored |= map_tensors(file)
        except Exception as error:  # damage raises many kinds
            raise ModelError(f"{file} cannot be read as a quantized model ({error!r}).") from error
    del skeleton.config.quantization_config
    weights = weights_of(skeleton, stored, _reader(stored, dtype))
    model = assemble(skeleton, weights, dtype, to=to)
    if marks := _marks(directory):
        model.veneer_marks = marks  # type: ignore[assignment]
    read_ahead(model)
    return model


def _marks(directory: Path) -> dict[str, str]:
    """Return the base's fingerprint from before; empty if another program quantized it."""
    report = directory / REPORT
    if not report.is_file():
        return {}
    try:
        return dict(json.loads(report.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{report} cannot be read ({error}); quantize the model anew.") from error


def _reader(
    stored: Mapping[str, Tensor], dtype: torch.dtype
) -> Callable[[str], Tensor | QuantizedWeight]:
    beside: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        if match := BESIDE.fullmatch(name):
            beside[match["path"]][match["key"]] = tensor

    def weight(name: str) -> Tensor | QuantizedWeight:
        tensors = beside.get(name.removesuffix(".weight"), {}) | {"weight": stored[name]}
        try:
            return _weight(tensors, dtype)
        except Exception as error:  # bitsandbytes asserts
            raise ModelError(f"{name} cannot be read as a quantized weight ({error!r}).") from error

    return weight


def weights_of(
    skeleton: PreTrainedModel,
    stored: Container[str],
    weight: Callable[[str], AnyWeight],
) -> Iterator[tuple[str, AnyWeight]]:
    """Yield the skeleton's weights of which files have the names `stored`, by its own names.

    weight: returns what the files have under a name. Raises ModelError for experts that are not
    all there.
    """
    names = stored_names(skeleton) if quantizable_stacks(skeleton) else None
    for name in skeleton.state_dict():
        own = name if names is None or name in stored else names.whole.get(name, name)
        own = own if own in stored else own.removeprefix(f"{skeleton.base_model_prefix}.")
        if own in stored:
            yield name, weight(own)
        elif names is not None and name in names.counts:
            layouts = (names.experts.get(name), names.own_pieces(name))
            for experts in filter(None, layouts):
                if experts[0][0].name in stored:
                    owner = skeleton.get_submodule(name.rpartition(".")[0])
                    yield name, _stack(name, owner, experts, stored, weight)
                    break


def _stack(
    name: str,
    owner: nn.Module,
    experts: Sequence[Sequence[Piece]],
    stored: Container[str],
    weight: Callable[[str], Any],
) -> Tensor | QuantizedStack:
    """Return a stack of which the files have pieces of each expert: quantized ones stay there."""
    missing = [piece.name for pieces in experts for piece in pieces if piece.name not in stored]
    if missing:
        raise ModelError(f"{name} lacks {len(missing)} of its experts' weights: {listed(missing)}.")

    def expert(e: int) -> Any:
        pieces = [weight(piece.name) for piece in experts[e]]
        quantized = [piece for piece in pieces if isinstance(piece, QuantizedWeight)]
        if len(quantized) == len(pieces):
            return joined(quantized)
        return torch.cat([dense(piece) for piece in pieces])

    transposed = bool(getattr(owner, "is_transposed", False))
    if isinstance(expert(0), QuantizedWeight):
        return QuantizedStack(LazyExperts(len(experts), expert), transposed=transposed)
    whole = torch.stack([expert(e) for e in range(len(experts))])
    return whole.transpose(1, 2).contiguous() if transposed else whole


def _weight(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | QuantizedWeight:
    from veneer.quant.int8 import Int8
    from veneer.quant.nf4 import NF4, STATE

    if any(key.startswith(STATE) for key in tensors):
        return NF4.from_tensors(tensors, dtype)
    if "SCB" in tensors:
        return Int8.from_tensors(tensors, dtype)
    return tensors["weight"]


def read_ahead(model: PreTrainedModel) -> None:
    """Read the next block's quantized weights while one block's are used, and experts when the
    router has chosen them; of a sharded model, and of one on an accelerator, nothing is in files
    any more."""
    if passes_of(model) is not None or model.device.type != "cpu":
        return
    blocks: dict[str, list[QuantizedWeight]] = defaultdict(list)
    for path, layer in quantized_layers(model).items():
        block = re.match(r".*?\.\d+(?=\.)", path)
        if block:
            blocks[block[0]].append(layer.quantized_weight)
    if hasattr(mmap, "MADV_DONTNEED"):
        ReadAhead(list(blocks.values()), quantized_stacks(model).values())
