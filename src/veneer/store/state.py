"""The value in which all adapter formats meet, taken from a model and laid over one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import AdapterError, ConfigError, nearest
from veneer.frozen.packed import FrozenLinear
from veneer.lowrank.adapter import Adapter
from veneer.lowrank.config import LoRA
from veneer.lowrank.layers import LoRAEmbedding, lora_layers
from veneer.methods.attach import adapters, check_name, in_use, put, put_method
from veneer.methods.config import Method
from veneer.methods.targets import Layer, adaptable_layers, resolve
from veneer.methods.unfreeze import replaced_weights, unfreeze
from veneer.methods.virtual import shape_of, stored, virtual_tokens
from veneer.methods.vocabulary import extend_tokenizer, is_tied, new_words, put_rows
from veneer.models.fingerprint import base_parameters, fingerprint

LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Rows:
    """New words with their rows of the embedding and, where it is not tied, of the head."""

    words: tuple[str, ...]
    start: int  # the id of the first
    embedding: Tensor  # (new, dim)
    head: Tensor | None = None  # (new, dim)


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model and any file.

    `tensors` are keyed by the base's own paths: `<path>.lora_A` (rank, in) and `<path>.lora_B`
    (out, rank) for linear layers, `<path>.lora_embedding_A` (rank, words) and `_B` (dim, rank) for
    embeddings. Of freeze and full they are the weights themselves; of prefix and prompt one tensor,
    under the method's name: (layers, 2, kv_heads, virtual, head_dim) and (virtual, dim).
    """

    config: LoRA | Method
    tensors: dict[str, Tensor]
    rows: Rows | None = None
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    # Base weights that came along in the file; they must be the base's own.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
        """Yield (path, A, B, whether an embedding) for each layer that has both."""
        for names in (LINEAR, EMBEDDING):
            for key, A in self.tensors.items():
                path, _, kind = key.rpartition(".")
                if kind == names[0] and (B := self.tensors.get(f"{path}.{names[1]}")) is not None:
                    yield path, A, B, names is EMBEDDING


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
    if isinstance(config, Method) and not config.replaces_weights:
        home = virtual_tokens(model)
        assert home is not None
        with torch.no_grad():
            tensors = {config.method: home.adapters[name]().clone().contiguous()}
        config = replace(config, prefix_mlp=None)  # what it makes is what is kept
    elif isinstance(config, Method):
        tensors = {key: w.detach().clone() for key, w in replaced_weights(model, config).items()}
    else:
        tensors = _factors(model, name)
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
    return AdapterState(config, tensors, rows, model.config._name_or_path, marks)


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
    problems = [] if force else _foreign(model, state, tokenizer)
    if isinstance(state.config, LoRA):
        problems += _misfits(model, state, state.config)
    elif state.config.replaces_weights:
        problems += _misfit_weights(model, state, state.config)
    else:
        problems += _misfit_virtual(model, state, state.config)
    if state.rows is not None:
        problems += _misfit_rows(model, state.rows, tokenizer)
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
            tensors[f"{path}.{keys[0]}"] = part.lora_A.detach().clone()
            tensors[f"{path}.{keys[1]}"] = part.lora_B.detach().clone()
    return tensors


def _parts(state: AdapterState, config: LoRA) -> dict[str, Adapter]:
    return {
        path: Adapter(
            A.to(torch.float32),
            B.to(torch.float32),
            scaling=config.scaling_of(path),
            dropout=0.0 if embedding else config.dropout,
        )
        for path, A, B, embedding in state.layers()
    }


def _misfit_weights(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    try:
        wanted = replaced_weights(model, config)
    except ConfigError as error:
        return [str(error).rstrip(".")]
    return _misshapen(state, {key: tuple(weight.shape) for key, weight in wanted.items()})


def _misfit_virtual(model: PreTrainedModel, state: AdapterState, config: Method) -> list[str]:
    try:
        return _misshapen(state, {config.method: shape_of(model, config)})
    except ConfigError as error:
        return [str(error).rstrip(".")]


def _misshapen(state: AdapterState, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what differs from tensors of these names and shapes."""
    problems = [f"{key} is missing" for key in wanted if key not in state.tensors]
    for key, tensor in state.tensors.items():
        if key not in wanted:
            problems.append(f"{key} is none of the weights that train{nearest(key, wanted)}")
            continue
        if tuple(tensor.shape) != wanted[key]:
            there = tuple(tensor.shape)
            problems.append(f"{key} is {there}, but needs to be {wanted[key]}")
        if not _is_finite(tensor):
            problems.append(f"{key} has values that are not finite numbers")
    return problems


def _foreign(
    model: PreTrainedModel, state: AdapterState, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    here = fingerprint(model, tokenizer)
    differing = [
        part for part, mark in state.base_fingerprint.items() if here.get(part, mark) != mark
    ]
    if not differing:
        return []
    return [
        f"it was trained on another base ({state.base_name or 'unnamed'}: its "
        f"{' and '.join(differing)} differ; force overrides this)"
    ]


def _misfits(model: nn.Module, state: AdapterState, config: LoRA) -> list[str]:
    problems = []
    places = {layer.path: layer for layer in adaptable_layers(model)}
    complete: set[str] = set()
    for path, A, B, embedding in state.layers():
        complete.add(path)
        layer = places.get(path)
        if layer is None:
            problems.append(f"{path} is no layer of this model{nearest(path, places)}")
        elif layer.is_linear == embedding:
            problems.append(f"{path} is a {type(layer.module).__name__}, of the other kind")
        else:
            rank, (out, in_) = config.rank_of(path), layer.shape
            if tuple(A.shape) != (rank, in_) or tuple(B.shape) != (out, rank):
                problems.append(
                    f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                    f"but needs {(rank, in_)} and {(out, rank)}"
                )
    for key, tensor in state.tensors.items():
        path = key.rpartition(".")[0]
        if path not in complete:
            problems.append(f"{key} stands alone, without its other half")
        if not _is_finite(tensor):
            problems.append(f"{key} has values that are not finite numbers")
    try:
        wanted = {layer.path for layer in resolve(model, config)}
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    else:
        missing = sorted(wanted - complete)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            problems.append(f"weights are missing for {', '.join(missing[:3])}{more}")
        problems += [
            f"{path} has weights, but is not among the targets"
            for path in sorted(complete - wanted)
        ]
    own = base_parameters(model, every_name=True)
    for path, weight in state.base_weights.items():
        base = own.get(path)
        if (
            base is None
            or base.shape != weight.shape
            or not torch.equal(base.detach().cpu().to(torch.bfloat16), weight.to(torch.bfloat16))
        ):
            problems.append(f"it brings a {path} of its own that differs from the base's")
    return problems


def _misfit_rows(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if new_words(model) is not None:
        return ["the model has new words already, and this adapter brings its own"]
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | FrozenLinear):
        return ["it brings new words, which need a base whose embedding and head are not adapted"]
    problems = []
    known, dim = embedding.weight.shape
    if not 0 <= rows.start <= known:
        problems.append(f"its new words start at {rows.start}, but the base has {known} words")
    if (rows.head is None) != is_tied(embedding, head):
        problems.append("the base and it differ in whether embedding and head are tied")
    for part, values in (("embedding", rows.embedding), ("head", rows.head)):
        if values is None:
            continue
        if tuple(values.shape) != (len(rows.words), dim):
            problems.append(
                f"its new rows of the {part} are {tuple(values.shape)}, "
                f"but must be {(len(rows.words), dim)}"
            )
        if not _is_finite(values):
            problems.append(f"its new rows of the {part} have values that are not finite numbers")
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        found = [vocabulary.get(word) for word in rows.words]
        there = list(range(rows.start, rows.start + len(rows.words)))
        if found != there and (any(i is not None for i in found) or len(tokenizer) != rows.start):
            problems.append(
                f"the tokenizer has other tokens where its new words start ({rows.start})"
            )
    return problems


def _is_finite(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_meta and tensor.is_floating_point()
    return plain and bool(torch.isfinite(tensor.to(torch.float32)).all())


def _shortest_names(paths: set[str], layers: list[Layer]) -> tuple[str, ...]:
    """Return last names where these say exactly which layers are meant, and whole paths if not."""
    names = {path.rpartition(".")[2] for path in paths}
    same = {layer.path for layer in layers if layer.name in names}
    return tuple(sorted(names if same == paths else paths))
