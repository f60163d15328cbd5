"""The value in which all adapter formats meet, taken from a model and laid over one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import AdapterError, nearest
from veneer.lowrank.adapter import Adapter, Factors
from veneer.lowrank.config import LoRA
from veneer.lowrank.layers import LoRAEmbedding, lora_layers
from veneer.methods.attach import adapters, check_name, in_use, put, put_method
from veneer.methods.config import Method, is_virtual
from veneer.methods.targets import Layer, adaptable_layers
from veneer.methods.unfreeze import replaced_weights, unfreeze
from veneer.methods.virtual import stored, virtual_tokens
from veneer.methods.vocabulary import extend_tokenizer, new_words, put_rows
from veneer.models.fingerprint import fingerprint
from veneer.store.misfits import misfits

LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE, START = "magnitude", ("start_A", "start_B")


@dataclass(frozen=True)
class Rows:
    """New words with their rows of the embedding and, where it is not tied, of the head."""

    words: tuple[str, ...]
    start: int  # the id of the first
    embedding: Tensor  # (new, dim)
    head: Tensor | None = None  # (new, dim)


@dataclass(frozen=True)
class StoredLayer:
    """What an adapter has over one layer: see lowrank/adapter.py's Adapter."""

    path: str
    A: Tensor
    B: Tensor
    is_embedding: bool
    magnitude: Tensor | None
    start: Factors | None


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model and any file.

    `tensors` are keyed by the base's own paths: `<path>.lora_A` (rank, in) and `<path>.lora_B`
    (out, rank) for linear layers, `<path>.lora_embedding_A` (rank, words) and `_B` (dim, rank) for
    embeddings; with DoRA `<path>.magnitude` (out,); where A and B did not start at zero, where they
    did, `<path>.start_A` and `.start_B`. Of freeze and full they are the weights themselves; of
    prefix and prompt one tensor, under the method's name: (layers, 2, kv_heads, virtual, head_dim)
    and (virtual, dim).
    """

    config: LoRA | Method
    tensors: dict[str, Tensor]
    rows: Rows | None = None
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    # Base weights that came along in the file; they must be the base's own.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    task: str | None = (
        "CAUSAL_LM"  # what the base is for, in PEFT's words; None for what it has none
    )

    def layers(self) -> Iterator[StoredLayer]:
        """Yield each layer that has both factors."""
        found = self.tensors.get
        for names in (LINEAR, EMBEDDING):
            for key, A in self.tensors.items():
                path, _, kind = key.rpartition(".")
                if kind == names[0] and (B := found(f"{path}.{names[1]}")) is not None:
                    A0, B0 = (found(f"{path}.{name}") for name in START)
                    start = None if A0 is None or B0 is None else (A0, B0)
                    magnitude = found(f"{path}.{MAGNITUDE}")
                    yield StoredLayer(path, A, B, names is EMBEDDING, magnitude, start)


def capture(
    model: PreTrainedModel,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AdapterState:
    """Return the adapter called `name` (by default the one in use) as a value.

    Raises AdapterError if there is none of that name, or no single one in use.
    """
    attached = adapters(model)
    if name is None:
        acting = list(in_use(model))
        if len(acting) != 1:
            raise AdapterError(f"{len(acting)} adapters are in use; name the one to save.")
        name = acting[0]
    if name not in attached:
        raise AdapterError(f"No adapter is called {name!r}{nearest(name, attached)}.")
    config = attached[name]
    tensors: dict[str, Tensor]
    if isinstance(config, Method) and is_virtual(config):
        home = virtual_tokens(model)
        assert home is not None
        with torch.no_grad():
            tensors = {config.method: home.adapters[name]().clone().contiguous()}
        config = replace(config, prefix_mlp=None)  # what it makes is what is kept
    elif isinstance(config, Method):
        tensors = {key: w.detach().clone() for key, w in replaced_weights(model, config).items()}
    else:
        tensors = _factors(model, name)
        if config.init == "lora_ga" and not any(key.endswith(START[0]) for key in tensors):
            config = replace(config, init="kaiming")  # no gradient has come, and it started so
        paths = {key.rpartition(".")[0] for key in tensors}
        targets = _shortest_names(paths, adaptable_layers(model))
        config = replace(config, targets=targets, layers=None)
    words = new_words(model)
    rows = None
    if words is not None:
        head = None if words.tied else words.head.rows.detach().clone()
        embedding = words.embedding
        rows = Rows(embedding.words, embedding.start, embedding.rows.detach().clone(), head)
    marks = fingerprint(model, tokenizer)
    base_name = model.config._name_or_path
    return AdapterState(config, tensors, rows, base_name, marks, task=_task_of(model))


def _task_of(model: PreTrainedModel) -> str | None:
    """Return PEFT's word for what a model generates; it has a class of its own for each."""
    if not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def install(
    model: PreTrainedModel,
    state: AdapterState,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
) -> None:
    """Lay a stored adapter over `model`, frozen and in use; new words go to `tokenizer` too.

    Raises AdapterError, which lists everything that is wrong at once: a foreign base (unless
    `force`), keys that are missing or belong nowhere, wrong shapes, values that are not finite.
    """
    check_name(model, name)
    problems = misfits(model, state, tokenizer, force=force)
    if problems:
        raise AdapterError("This adapter does not fit the model: " + "; ".join(problems) + ".")
    if isinstance(state.config, LoRA):
        put(model, name, state.config, _parts(state, state.config))
    elif not state.config.replaces_weights:
        put_method(model, name, state.config, stored(state.config, state.tensors))
    else:
        unfreeze(model, state.config)
        with torch.no_grad():
            for key, weight in replaced_weights(model, state.config).items():
                weight.copy_(state.tensors[key])
        put_method(model, name, state.config)
    model.requires_grad_(False)
    if state.rows is not None:
        rows = state.rows
        put_rows(model, rows.words, rows.embedding, rows.head, start=rows.start)
        model.requires_grad_(False)
        if tokenizer is not None:
            extend_tokenizer(tokenizer, rows.words)


def _factors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return A and B of each layer that the adapter called `name` lies on."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model):
        if name in layer.adapters:
            part = layer.adapters[name]
            assert isinstance(part, Adapter)
            keys = EMBEDDING if isinstance(layer, LoRAEmbedding) else LINEAR
            values = zip(keys, (part.lora_A, part.lora_B), strict=True)
            optional = zip((MAGNITUDE, *START), (part.magnitude, *(part.start or ())), strict=False)
            for key, tensor in (*values, *optional):
                if tensor is not None:
                    tensors[f"{path}.{key}"] = tensor.detach().clone()
    return tensors


def _parts(state: AdapterState, config: LoRA) -> dict[str, Adapter]:
    parts = {}
    for layer in state.layers():
        A, B, magnitude, A0, B0 = (
            None if tensor is None else tensor.to(torch.float32)
            for tensor in (layer.A, layer.B, layer.magnitude, *(layer.start or (None, None)))
        )
        assert A is not None
        assert B is not None
        parts[layer.path] = Adapter(
            A,
            B,
            scaling=config.scaling_of(layer.path),
            dropout=0.0 if layer.is_embedding else config.dropout,
            magnitude=magnitude,
            start=None if A0 is None or B0 is None else (A0, B0),
        )
    return parts


def _shortest_names(paths: set[str], layers: list[Layer]) -> tuple[str, ...]:
    """Return last names where these say exactly which layers are meant, and whole paths if not."""
    names = {path.rpartition(".")[2] for path in paths}
    same = {layer.path for layer in layers if layer.name in names}
    return tuple(sorted(names if same == paths else paths))
