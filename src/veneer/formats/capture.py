"""Take an adapter off a model as an AdapterState."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.conv import LoRAConv2d
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers
from veneer.adapter.method import Method, is_virtual
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.new_tokens import NewTokens, new_tokens_of
from veneer.adapter.parameters import AdaptedParameter
from veneer.adapter.score import scores
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.unfreeze import replaced_weights
from veneer.adapter.use import adapters, in_use
from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.errors import AdapterError, nearest
from veneer.formats.state import (
    CAUSAL,
    RANKS,
    START,
    AdapterState,
    NewTokenRows,
    StoredLayer,
    StoredTokens,
    shortest_names,
)
from veneer.formats.training import as_stored, computed_in
from veneer.models.description import FactorKind
from veneer.models.fingerprint import fingerprint
from veneer.processes.sharded import whole


def capture(
    model: PreTrainedModel,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    copy: bool = True,
) -> AdapterState:
    """Return the adapter called `name` (by default the one in use) as a value.

    Without `copy`, tensors that the model has as they are share its memory. Where FSDP2 shards the
    model, all its processes must call this. Raises AdapterError if there is none of that name, or
    no single one in use.
    """
    attached = adapters(model)
    if name is None:
        active = list(in_use(model))
        if len(active) != 1:
            raise AdapterError(f"{len(active)} adapters are in use; name the one to save.")
        name = active[0]
    if name not in attached:
        raise AdapterError(f"No adapter is called {name!r}{nearest(name, attached)}.")
    own = _copy if copy else _shared
    config = attached[name]
    live: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    if isinstance(config, Method) and is_virtual(config):
        virtual = virtual_tokens_of(model)
        assert virtual is not None
        live = dict(virtual.adapters[name].named_parameters())
        with torch.no_grad():
            tensors = {config.method: own(virtual.adapters[name]()).contiguous()}
        config = replace(config, prefix_mlp=None)  # only what it makes is stored
    elif isinstance(config, Method):
        live = replaced_weights(model, config)
        tensors = _each(own, live)
    else:
        live = layer_tensors(model, name)
        tensors = _each(own, live)
        if config.init == "lora_ga" and not any(key.endswith(START[0]) for key in tensors):
            config = replace(config, init="kaiming")  # its start so far: no gradient has come
        if paths := {key.rpartition(".")[0] for key in tensors}:
            targets = shortest_names(paths, named_paths(model))
            config = replace(config, targets=targets, layers=None)
    new_tokens = new_tokens_of(model)
    training = dict(active_adapters_of(model).notes.get(name, {}))
    # One that was loaded is frozen, and knows what it was trained over, or not.
    if any(tensor.requires_grad for tensor in live.values()):
        training["base"] = as_stored(computed_in(model))
    return AdapterState(
        config,
        tensors,
        None if new_tokens is None else _new_token_rows(model, new_tokens, own),
        model.config._name_or_path,
        fingerprint(model, tokenizer),
        modules_to_save=_each(own, modules_to_save_of(model, name)),
        trained_tokens={
            path: StoredTokens(tuple(tokens.ids.tolist()), own(tokens.rows))
            for path, tokens in trained_tokens_of(model, name).items()
        },
        task=RANKS if scores(model, name) else task_of(model),
        training=training,
    )


def layer_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the adapter's live tensors of each layer, with the keys and shapes of
    `AdapterState.tensors`."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model):
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, Adapter)
            A = adapter.lora_A
            if isinstance(layer, LoRAConv2d):
                window = layer.original.weight.shape[1:]  # type: ignore[index]
                A = A.unflatten(1, window)
            stored = StoredLayer(
                path,
                A,
                adapter.lora_B,
                _kind_of(layer),
                adapter.magnitude,
                adapter.lora_bias,
                adapter.start,
            )
            tensors |= stored.tensors()
    return tensors


def modules_to_save_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's live modules to save, by the path of the base's weight."""
    weights = dict(active_adapters_of(model).modules_to_save.get(name, {}))
    if in_use(model) == {name: 1.0}:
        for path in weights:
            owner, parameter = owner_of(model, path)
            acting = owner._parameters[parameter]
            if isinstance(acting, DTensor):  # what was attached is no longer what trains
                weights[path] = acting
    return weights


def trained_tokens_of(model: nn.Module, name: str) -> dict[str, TrainedTokens]:
    """Return the live rows of trained tokens by the path of the embedding or head; rows that the
    two share have the first path."""
    by_path: dict[str, TrainedTokens] = {}
    for path, layer in lora_layers(model):
        if name in layer.tokens:
            tokens = layer.tokens[name]
            assert isinstance(tokens, TrainedTokens)
            if not any(tokens is shared for shared in by_path.values()):
                by_path[path] = tokens
    return by_path


def named_paths(model: nn.Module) -> Iterator[str]:
    """Yield the paths of a model's modules and parameters, without adapters among the modules.

    All that a target may name: a stack of experts is a parameter called as layers are elsewhere.
    """
    for path, module in model.named_modules():
        if not isinstance(module, Adapter | TrainedTokens):
            yield path
    for path, _ in model.named_parameters():
        yield path


def task_of(model: nn.Module) -> str:
    """Return PEFT's name for the task of a model, or "" where it has none."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return "SEQ_2_SEQ_LM"
    can = getattr(model, "can_generate", lambda: False)()
    return CAUSAL if name.endswith(("ForCausalLM", "LMHeadModel")) or can else ""


def _new_token_rows(
    model: PreTrainedModel, new_tokens: NewTokens, own: Callable[[Tensor], Tensor]
) -> NewTokenRows:
    embedding, head = new_tokens.embedding, new_tokens.head
    base_rows = embedding.original.weight.shape[0]  # type: ignore[index]
    bias = getattr(head.original, "bias", None)
    paths: tuple[str, ...] = ()
    if embedding.start + len(embedding.tokens) <= base_rows and bias is None:
        by_module = {id(module): path for path, module in model.named_modules()}
        paths = tuple(by_module[id(layer)] for layer in (embedding, head))
    return NewTokenRows(
        embedding.tokens,
        embedding.start,
        own(embedding.rows),
        None if new_tokens.tied else own(head.rows),
        paths,
    )


def _each(own: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: own(tensor) for key, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).clone()


def _shared(tensor: Tensor) -> Tensor:
    return whole(tensor.detach())


def _kind_of(layer: Adapted) -> FactorKind:
    if isinstance(layer, AdaptedParameter):
        return "parameter"
    return "embedding" if isinstance(layer, LoRAEmbedding) else "linear"
