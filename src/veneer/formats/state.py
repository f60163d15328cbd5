"""The value in which all adapter formats meet, taken from a model and laid over one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import adapters, check_name, in_use, put, put_method
from veneer.adapter.config import LoRA
from veneer.adapter.method import Method, is_virtual
from veneer.adapter.new_tokens import NewTokens, attach_token_rows, extend_tokenizer, new_tokens_of
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.unfreeze import replaced_weights, unfreeze
from veneer.adapter.virtual import stored_virtual_tokens
from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.errors import AdapterError, joined, nearest
from veneer.formats.parts import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    PARAMETER,
    START,
    adapters_from,
    factors_of,
    saved_of,
    tokens_from,
    tokens_of,
)
from veneer.formats.validate import validate
from veneer.lowrank.formula import Factors
from veneer.models.fingerprint import fingerprint

CAUSAL = "CAUSAL_LM"
KINDS: dict[Any, tuple[str, str]] = {
    "linear": LINEAR,
    "embedding": EMBEDDING,
    "parameter": PARAMETER,
}


@dataclass(frozen=True)
class Rows:
    """New words with their rows of the embedding and, where it is not tied, of the head."""

    words: tuple[str, ...]
    start: int  # the id of the first
    embedding: Tensor  # (new, dim)
    head: Tensor | None = None  # (new, dim)
    # Paths of embedding and head, where the base has rows for these words that nobody uses.
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Words that the base has, with rows in the place of its own; None where embedding and head are
    one weight, and the other of them says which."""

    ids: tuple[int, ...]
    rows: Tensor | None  # (rows, dim)


@dataclass(frozen=True)
class StoredLayer:
    """What an adapter has over one layer, or one parameter: see adapter/adapter.py's Adapter."""

    path: str
    A: Tensor
    B: Tensor
    kind: Literal["linear", "embedding", "parameter"]  # a convolution is linear, with a window
    magnitude: Tensor | None
    bias: Tensor | None
    start: Factors | None

    @property
    def is_embedding(self) -> bool:
        return self.kind == "embedding"


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model and any file.

    `tensors` are keyed by the base's own paths: `<path>.lora_A` (rank, in) and `<path>.lora_B`
    (out, rank) for linear layers, A (rank, in, height, width) for convolutions,
    `<path>.lora_embedding_A` (rank, words) and `_B` (dim, rank) for embeddings,
    `<path>.lora_parameter_A` (experts, rank, in) and `_B` (experts, out, rank) for a parameter, or
    without the first dimension; with DoRA `<path>.magnitude` (out,); with a bias of B's
    `<path>.lora_bias` (out,); where A and B did not start at zero, where they did, `<path>.start_A`
    and `.start_B`. Of freeze and full they are the weights themselves; of prefix and prompt one
    tensor, under the method's name: (layers, 2, kv_heads, virtual, head_dim) and (virtual, dim).
    """

    config: LoRA | Method
    tensors: dict[str, Tensor]
    rows: Rows | None = None
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    # Base weights that came along in the file; they must be the base's own.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    # By the path of the base's weight, what stands in its place while the adapter acts.
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tokens] = field(default_factory=dict)  # by the path of embedding or head
    task: str = CAUSAL  # as PEFT names it
    training: Mapping[str, Any] = field(default_factory=dict)  # how it came about, where known

    def beyond_factors(self) -> list[str]:
        """Return in words what the adapter has beside A, B and magnitudes of layers: what a format
        that knows no more than these must refuse."""
        kinds = {
            "new words": self.rows is not None,
            "biases of its own (lora_bias)": any(layer.bias is not None for layer in self.layers()),
            "windows of convolutions": any(layer.A.ndim == 4 for layer in self.layers()),
            "stacks of experts": any(layer.kind == "parameter" for layer in self.layers()),
            "weights in the place of the base's own": bool(self.saved),
            "rows of single words": bool(self.tokens),
        }
        return [words for words, has in kinds.items() if has]

    def layers(self) -> Iterator[StoredLayer]:
        """Yield each layer that has both factors."""
        found = self.tensors.get
        for kind, names in KINDS.items():
            for key, A in self.tensors.items():
                path, _, name = key.rpartition(".")
                if name == names[0] and (B := found(f"{path}.{names[1]}")) is not None:
                    A0, B0 = (found(f"{path}.{name}") for name in START)
                    start = None if A0 is None or B0 is None else (A0, B0)
                    magnitude, bias = (found(f"{path}.{name}") for name in (MAGNITUDE, BIAS))
                    yield StoredLayer(path, A, B, kind, magnitude, bias, start)


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
        home = virtual_tokens_of(model)
        assert home is not None
        with torch.no_grad():
            tensors = {config.method: home.adapters[name]().clone().contiguous()}
        config = replace(config, prefix_mlp=None)  # what it makes is what is kept
    elif isinstance(config, Method):
        tensors = {key: w.detach().clone() for key, w in replaced_weights(model, config).items()}
    else:
        tensors = _copies(factors_of(model, name))
        if config.init == "lora_ga" and not any(key.endswith(START[0]) for key in tensors):
            config = replace(config, init="kaiming")  # no gradient has come, and it started so
        paths = {key.rpartition(".")[0] for key in tensors}
        if paths:
            targets = shortest_names(paths, model)
            config = replace(config, targets=targets, layers=None)
    words = new_tokens_of(model)
    rows = None
    if words is not None:
        head = None if words.tied else words.head.rows.detach().clone()
        embedding = words.embedding
        own = embedding.rows.detach().clone()
        rows = Rows(embedding.tokens, embedding.start, own, head, _places(model, words))
    return AdapterState(
        config,
        tensors,
        rows,
        model.config._name_or_path,
        fingerprint(model, tokenizer),
        saved=_copies(saved_of(model, name)),
        tokens={
            path: Tokens(tuple(tokens.ids.tolist()), tokens.rows.detach().clone())
            for path, tokens in tokens_of(model, name).items()
        },
        task=task_of(model),
        training=active_adapters_of(model).notes.get(name, {}),
    )


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
    problems = validate(model, state, tokenizer, force=force)
    if problems:
        raise AdapterError(f"This adapter does not fit the model: {joined(problems)}.")
    if isinstance(state.config, LoRA):
        put(
            model,
            name,
            state.config,
            adapters_from(state, state.config),
            tokens=tokens_from(model, state.tokens),
            saved=state.saved,
        )
    elif not state.config.replaces_weights:
        put_method(model, name, state.config, stored_virtual_tokens(state.config, state.tensors))
    else:
        unfreeze(model, state.config)
        with torch.no_grad():
            for key, weight in replaced_weights(model, state.config).items():
                weight.copy_(state.tensors[key])
        put_method(model, name, state.config)
    active_adapters_of(model).notes[name] = state.training
    model.requires_grad_(False)
    if state.rows is not None:
        rows = state.rows
        attach_token_rows(model, rows.words, rows.embedding, rows.head, start=rows.start)
        model.requires_grad_(False)
        if tokenizer is not None:
            extend_tokenizer(tokenizer, rows.words)


def _places(model: PreTrainedModel, words: NewTokens) -> tuple[str, ...]:
    """Return the paths of embedding and head, if the base has rows where the new words are."""
    known = words.embedding.original.weight.shape[0]  # type: ignore[index]
    bias = getattr(words.head.original, "bias", None)
    if words.embedding.start + len(words.embedding.tokens) > known or bias is not None:
        return ()
    paths = {id(module): path for path, module in model.named_modules()}
    return tuple(paths[id(layer)] for layer in (words.embedding, words.head))


def task_of(model: nn.Module) -> str:
    """Return what PEFT would call the task of a model, or nothing where it has no name for it."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return "SEQ_2_SEQ_LM"
    can = getattr(model, "can_generate", lambda: False)()
    return CAUSAL if name.endswith(("ForCausalLM", "LMHeadModel")) or can else ""


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def shortest_names(paths: set[str], model: nn.Module) -> tuple[str, ...]:
    """Return last names where these say exactly which layers are meant, and whole paths if not.

    Other formats' readers look at every module, of whatever kind, that bears a name.
    """
    names = {path.rpartition(".")[2] for path in paths}
    same = {
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and not isinstance(module, Adapter | TrainedTokens)
    }
    return tuple(sorted(names if same == paths else paths))
