"""Merge an adapter into its base's GGUF file: unchanged tensors are copied bit for bit, and the
others are stored again, one by one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ModelError, joined
from veneer.files import new_file
from veneer.formats.contents import without_place
from veneer.formats.fold import without_start
from veneer.formats.gguf.names import EMBEDDING, HEAD, ROUTERS, Naming, Place, naming_over, permuted
from veneer.formats.state import AdapterState, NewTokenRows, StoredLayer
from veneer.formats.validate import differs_from_base, same_weight, validate
from veneer.lowrank.formula import delta_weight, rescaled
from veneer.models.fingerprint import Marks
from veneer.models.load import load_skeleton
from veneer.models.source import Source, open_source

Kind = GGMLQuantizationType
# The kinds that gguf can write, the smallest first. It can only read K and IQ kinds.
WRITABLE = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32)
# The share of an adapter's change that rounding may take or add. Of the demo's change in SmolLM2,
# Q8_0 keeps 100 %, and 85 of 88 answers are the same; Q4_1 keeps 7 %, and none is
# (`python -m bench.llama`).
TOLERANCE = 0.1
USER_DEFINED = int(gguf.TokenType.USER_DEFINED)


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A changed tensor, stored as `kind`; `was`: its kind in the base.

    error: ‖Ŵ − W‖ / ‖W‖, with Ŵ as stored and W the exact sum. kept: the share of the adapter's
    change ΔW that is left, ⟨Ŵ − W₀, ΔW⟩ / ‖ΔW‖²; a change much smaller than a kind's steps is lost,
    since each value is rounded back to the base's. change: ‖ΔW‖.
    """

    name: str
    was: str
    kind: str
    error: float
    kept: float
    change: float


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write; `data` computes its bytes when they are needed."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def write_merged(
    base: Path,
    state: AdapterState,
    out: Path,
    *,
    kind: str | None = None,
    force: bool = False,
) -> list[MergedTensor]:
    """Write the GGUF file `base` with an adapter merged into it; return the changed tensors.

    A changed tensor keeps its kind if gguf can write it, and otherwise takes the next larger one;
    `kind` (F16, Q8_0, ...) overrides that. New tokens go into the tokenizer's list. Memory holds
    one tensor at a time. Raises AdapterError for an adapter that is no LoRA or does not fit
    (another base unless `force`), and without `kind` for one that would mostly be rounded away;
    ModelError for a base that cannot be read.
    """
    if not isinstance(state.config, LoRA):
        raise AdapterError(
            f"Only lora is merged into GGUF, and this adapter's method is {state.config.method}; "
            "if it is made of weights, merge it into a directory."
        )
    one_kind = None if kind is None else _kind_called(kind)
    skeleton = load_skeleton(base)
    naming = naming_over(skeleton)
    source = open_source(base, skeleton)
    if source is None:
        raise ModelError(
            f"{base} is a {naming.architecture} model in which not all weights of "
            f"{skeleton.config.model_type} are found, so nothing can be merged into it. Merge into "
            "the model's directory (veneer merge DIRECTORY ADAPTER OUT), or let llama.cpp apply "
            "the adapter (veneer convert ADAPTER OUT.gguf --to gguf)."
        )
    _check(source, state, force=force)
    state, _ = without_start(state)
    report: list[MergedTensor] = []
    reader = gguf.GGUFReader(base)
    tensors = _tensors(reader, naming, state, one_kind, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as temporary, temporary.open("wb") as file:
        _write(file, reader, tensors, _metadata(reader, state.new_tokens))
        if one_kind is None and abs(kept_of(report) - 1) > TOLERANCE:
            kinds = "/".join(sorted({tensor.kind for tensor in report}))
            raise AdapterError(
                f"Rounded to {kinds}, {kept_of(report):.0%} of the adapter's change would be left. "
                f"Store the changed tensors as q8_0 or f16, or insist on a kind, by naming it "
                "(--gguf-type)."
            )
    return report


def kept_of(report: Sequence[MergedTensor]) -> float:
    """Return the share of the adapter's change that is left over all changed tensors."""
    whole = sum(tensor.change**2 for tensor in report)
    return sum(t.kept * t.change**2 for t in report) / whole if whole else 1.0


def kind_for(kind: Kind) -> Kind:
    """Return the kind to store a changed tensor as: its own, or the next larger one that gguf can
    write, because a K-quant is more exact than a plain kind of its size."""
    if kind in WRITABLE:
        return kind
    return next(other for other in WRITABLE if _bits(other) > _bits(kind))


def _bits(kind: Kind) -> float:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return 8 * size / block


def _kind_called(name: str) -> Kind:
    known = {kind.name.lower(): kind for kind in WRITABLE}
    if name.lower() not in known:
        raise ModelError(f"gguf cannot write {name!r}; it can write {', '.join(known)}.")
    return known[name.lower()]


def _check(source: Source, state: AdapterState, *, force: bool) -> None:
    """Raise AdapterError with every problem of the adapter on this base."""
    skeleton: Any = source.skeleton
    if not force:
        marks = Marks(skeleton)
        for name in source.names:
            marks.see(name, source.read(name))
        skeleton.veneer_marks = marks.fingerprint()
    problems = validate(skeleton, replace(state, base_weights={}), None, force=force)
    for path, weight in state.base_weights.items():
        if path not in source.names or not same_weight(source.read(path), weight):
            problems.append(differs_from_base(path))
    lacking = without_place(state, "merged GGUF")
    problems += [f"a merged GGUF has no place for {content}" for content in lacking]
    if problems:
        raise AdapterError(f"This adapter does not fit the base: {joined(problems)}.")


def _tensors(
    reader: gguf.GGUFReader,
    naming: Naming,
    state: AdapterState,
    one_kind: Kind | None,
    report: list[MergedTensor],
) -> list[_Tensor]:
    """Return the merged model's tensors in the base's order; computing one adds to `report`."""
    config, new_tokens = state.config, state.new_tokens
    assert isinstance(config, LoRA)
    layers = {layer.path: layer for layer in state.layers()}
    names = {origin.name for origin in reader.tensors} | ({HEAD} if naming.tied else set())
    there = {place.path for name, place in naming.by_name.items() if name in names}
    if unknown := [path for path in layers if path not in there]:
        raise AdapterError(f"GGUF has no tensor of its own for {', '.join(unknown)}.")
    changes = {
        name: (place, layers[place.path])
        for name, place in naming.by_name.items()
        if place.path in layers
    }

    def tensor(name: str, origin: gguf.ReaderTensor) -> _Tensor:
        kind, shape = origin.tensor_type, tuple(int(n) for n in reversed(origin.shape))
        place, layer = changes.get(name, (None, None))
        if layer is not None and not name.endswith(ROUTERS):  # which llama.cpp keeps in float32
            kind = kind_for(kind) if one_kind is None else one_kind
        rows = _new_rows(new_tokens, name)
        if new_tokens is not None and rows is not None:
            shape = (max(shape[0], new_tokens.start + len(rows)), *shape[1:])

        def data() -> np.ndarray:
            stored = _bytes(reader, origin)
            if layer is not None and place is not None:
                scaling = config.scaling_of(layer.path)
                stored, merged = _merged(origin, name, kind, place, layer, scaling)
                report.append(merged)
            if new_tokens is None or rows is None:
                return stored
            lines = stored.reshape(int(origin.shape[-1]), -1)  # (vocab, bytes of a row)
            added = _stored(rows.to(torch.float32).numpy(), kind).reshape(len(rows), -1)
            start, end = new_tokens.start, new_tokens.start + len(rows)
            return np.concatenate([lines[:start], added, lines[end:]]).reshape(-1)

        return _Tensor(name, kind, shape, data)

    tensors = [tensor(origin.name, origin) for origin in reader.tensors]
    if naming.tied and {EMBEDDING, HEAD} & set(changes):
        # The adapter changes one of them and not the other, so that they need a tensor each.
        if not naming.has_head:
            raise AdapterError(
                f"llama.cpp's {naming.architecture} has one tensor for embedding and head, and an "
                "adapter of one of them cannot be merged into it."
            )
        embedding = next(origin for origin in reader.tensors if origin.name == EMBEDDING)
        tensors.append(tensor(HEAD, embedding))
    return tensors


def _merged(
    origin: gguf.ReaderTensor,
    name: str,
    kind: Kind,
    place: Place,
    layer: StoredLayer,
    scaling: float,
) -> tuple[np.ndarray, MergedTensor]:
    """Return the bytes of W + ΔW, and how they differ from the exact sum."""
    B = place.of(layer.B)
    if place.is_stack:  # one expert after the other, or a stack would be in memory many times
        pieces = list(zip(origin.data, layer.A.expand(len(B), -1, -1), B, strict=True))
    else:
        pieces = [(origin.data, layer.A, B)]
    stored, sums = [], torch.zeros(4, dtype=torch.float64)
    for data, A, own in pieces:
        weight = torch.from_numpy(np.array(gguf.dequantize(data, origin.tensor_type)))
        weight = weight.T if place.is_embedding else weight  # (out, in), or (dim, vocab)
        delta = delta_weight(A, own, scaling)
        new = weight.view(delta.shape) + delta  # of a gate of one row, weight is (in,)
        if layer.magnitude is not None:
            new = rescaled(new, permuted(layer.magnitude.to(torch.float32), place.heads))
        change = new - weight.view(new.shape)
        new, change = (new.T, change.T) if place.is_embedding else (new, change)
        stored.append(_stored(new.contiguous().numpy(), kind))
        rows = stored[-1].reshape(len(new), -1)
        miss = torch.from_numpy(gguf.dequantize(rows, kind).reshape(tuple(new.shape))) - new
        sums += torch.stack([(x * y).sum() for x, y in _products(miss, new, change)]).double()
    missed, size, moved, miss_along = sums.tolist()
    error = (missed / size) ** 0.5 if size else 0.0
    # Ŵ − W₀ = ΔW + (Ŵ − W)
    kept = 1 + miss_along / moved if moved else 1.0
    report = MergedTensor(name, origin.tensor_type.name, kind.name, error, kept, moved**0.5)
    return np.concatenate(stored), report


def _products(miss: Tensor, new: Tensor, change: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(miss, miss), (new, new), (change, change), (miss, change)]


def _stored(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a weight as the bytes of a GGUF tensor of this kind, in one dimension."""
    return np.ascontiguousarray(gguf.quantize(weight, kind)).view(np.uint8).reshape(-1)


def _bytes(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor) -> np.ndarray:
    return reader.data[tensor.data_offset : tensor.data_offset + tensor.n_bytes]


def _new_rows(new_tokens: NewTokenRows | None, name: str) -> Tensor | None:
    """Return the rows that new tokens add to the tensor called `name`, or None."""
    if new_tokens is None:
        return None
    embedding, head = new_tokens.embedding, new_tokens.head
    return {
        EMBEDDING: embedding,
        HEAD: embedding if head is None else head,
        "output.bias": torch.zeros(len(new_tokens.tokens)),
    }.get(name)


def _metadata(reader: gguf.GGUFReader, new_tokens: NewTokenRows | None) -> bytes:
    """Return the base's metadata, byte for byte but for new tokens in its lists of tokens."""
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    ends = [*(field.offset for field in fields[1:]), reader.tensors[0].field.offset]
    return b"".join(
        _field(field, bytes(reader.data[field.offset : end]), new_tokens)
        for field, end in zip(fields, ends, strict=True)
    )


def _field(field: gguf.ReaderField, raw: bytes, new_tokens: NewTokenRows | None) -> bytes:
    """Return a metadata field's bytes, `raw` in the base, with new tokens added."""
    if new_tokens is None:
        return raw
    texts, start = [token.encode() for token in new_tokens.tokens], new_tokens.start
    new = {
        gguf.Keys.Tokenizer.LIST: [struct.pack("<Q", len(text)) + text for text in texts],
        gguf.Keys.Tokenizer.TOKEN_TYPE: [struct.pack("<i", USER_DEFINED)] * len(texts),
        gguf.Keys.Tokenizer.SCORES: [struct.pack("<f", 0.0)] * len(texts),
    }.get(field.name)
    if new is None:
        if not field.name.endswith(".vocab_size"):
            return raw
        return raw[:-4] + struct.pack("<I", max(int(field.contents()), start + len(texts)))
    old = [_item(field, index) for index in field.data]
    if len(old) < start:
        raise AdapterError(
            f"Its new tokens start at {start}, but the base's {field.name} ends at {len(old)}."
        )
    items = [*old[:start], *new, *old[start + len(new) :]]
    head = len(raw) - sum(map(len, old)) - 8  # up to the length of the list
    return raw[:head] + struct.pack("<Q", len(items)) + b"".join(items)


def _item(field: gguf.ReaderField, index: int) -> bytes:
    """Return the bytes of a list's item: of a string, its length first."""
    value = bytes(field.parts[index])
    is_text = field.types[-1] == GGUFValueType.STRING
    return bytes(field.parts[index - 1]) + value if is_text else value


def _write(
    file: BinaryIO, reader: gguf.GGUFReader, tensors: list[_Tensor], metadata: bytes
) -> None:
    version, values = (reader.fields[f"GGUF.{n}"].contents() for n in ("version", "kv_count"))
    step = int(reader.alignment)
    file.write(struct.pack("<IIQQ", gguf.GGUF_MAGIC, version, len(tensors), values))
    file.write(metadata)
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        dims = tensor.shape[::-1]
        file.write(struct.pack("<Q", len(name)) + name)
        file.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, offset))
        offset += -(-tensor.nbytes // step) * step
    for tensor in tensors:
        file.write(bytes(-file.tell() % step))
        data = tensor.data()
        assert data.nbytes == tensor.nbytes, (tensor.name, data.nbytes, tensor.nbytes)
        file.write(data.data)
    file.write(bytes(-file.tell() % step))
