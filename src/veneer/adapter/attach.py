"""Attaching adapters to a base, and detaching them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.conv import LoRAConv2d, why_not_adaptable
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.invocation import (
    attach_invocation,
    check_invocation,
    detach_invocations,
    tokenized,
)
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.method import Method
from veneer.adapter.modules_to_save import (
    attach_modules_to_save,
    base_weights_in_place,
    detach_modules_to_save,
    owner_of,
    switch_modules_to_save,
)
from veneer.adapter.new_tokens import remove_tokens
from veneer.adapter.parameters import LoRAParameters
from veneer.adapter.start import start_from_rounding
from veneer.adapter.targets import check_parameters, resolve, uncovered, with_expert_ranks
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.unfreeze import unfreeze
from veneer.adapter.use import adapters, replacing, use
from veneer.adapter.virtual import new_virtual_tokens
from veneer.adapter.virtual_forward import attach_virtual_tokens, detach_virtual_tokens
from veneer.adapter.weight_access import Place
from veneer.errors import AdapterError, ConfigError, VeneerWarning
from veneer.lowrank.initial import directions
from veneer.models.block_buffers import whole
from veneer.models.description import Layer
from veneer.models.score import remove_score
from veneer.quant.stack import QuantizedStack, quantized_weights


def attach(
    model: nn.Module,
    config: LoRA | Method,
    *,
    name: str = "default",
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """Attach a fresh adapter called `name` to `model`, in place; it acts, and it alone trains.

    At first the model's outputs are exactly the base's, except with loftq, which makes up for what
    quantizing rounded away. A `seed` makes the start repeatable; torch's own random state stays as
    it is.
    A `Method` trains something else than a low-rank adapter: weights of the base, or virtual
    tokens. Virtual tokens change the outputs at once, as the tokens that they start from would;
    the `tokenizer` is for a `prompt_text`, and for an `invocation` that is a text.
    Warns (VeneerWarning) of weights that the targets `all` and `mlp` seem to mean but do not reach,
    such as routers.
    Returns the model. Raises TargetError for targets that match nothing, AdapterError for a name
    that is taken, ConfigError for a method or a start that does not suit the model, ModelError
    where loftq finds no weights from before quantizing.
    """
    check_name(model, name)
    if isinstance(config, Method):
        assert isinstance(model, PreTrainedModel)
        _attach_new_method(model, name, config, seed, tokenizer)
        return model
    if config.init == "auto":
        is_minigpt = getattr(getattr(model, "config", None), "model_type", None) == "minigpt"
        config = replace(config, init="gaussian" if is_minigpt else "kaiming")
    config = tokenized(config, tokenizer)
    targets = resolve(model, config)
    check_invocation(model, config, targets)
    config = with_expert_ranks(config, targets)
    check_parameters(config, targets)
    _check_start(model, config, targets)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    try:
        with base_weights_in_place(model):
            for target in targets:
                layer = adapted_layer(model, target.path)
                with whole(layer):  # some adapters start from its weight
                    layer.add(name, config, target.path, generator)
            if config.init == "loftq":
                assert isinstance(model, PreTrainedModel)
                start_from_rounding(model, name, generator)
    except BaseException:
        _detach_from_layers(model, {name})
        raise
    _activate(model, name, config)
    if text := uncovered(model, config):
        warnings.warn(text, VeneerWarning, stacklevel=2)
    return model


def attach_adapter(
    model: nn.Module,
    name: str,
    config: LoRA,
    layer_adapters: Mapping[str, Adapter],
    *,
    tokens: Mapping[str, TrainedTokens] | None = None,
    modules_to_save: Mapping[str, Tensor] | None = None,
) -> None:
    """Attach an adapter with given tensors, frozen, and let it act.

    layer_adapters: by the paths of layers and parameters; tokens: rows of single tokens by the
    paths of embedding and head; modules_to_save: weights that replace the base's, by their paths.
    """
    with base_weights_in_place(model):
        for path, adapter in layer_adapters.items():
            adapted_layer(model, path).attach(name, adapter.requires_grad_(False))
        for path, rows in (tokens or {}).items():
            layer = adapted_layer(model, path)
            assert isinstance(layer, AdaptedLayer)
            layer.attach_tokens(name, rows.requires_grad_(False))
        attach_modules_to_save(model, name, modules_to_save or {})
    _activate(model, name, config)


def attach_method(
    model: PreTrainedModel, name: str, config: Method, virtual: nn.Module | None = None
) -> None:
    """Attach what a method trains under a name, and let it act; `virtual`: its virtual tokens."""
    if virtual is not None:
        attach_virtual_tokens(model, name, virtual)
    active_adapters_of(model).configs[name] = config
    use(model, name)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Detach one adapter, or all of them, in place; layers without any are the base's own again.

    New tokens go with the last adapter, from the model though not from the tokenizer. Returns the
    model. Raises AdapterError for a name that is not attached, and where weights of the base itself
    were trained.
    """
    active_adapters = active_adapters_of(model)
    names = set(active_adapters.configs) if name is None else {name}
    if unknown := names - set(active_adapters.configs):
        raise AdapterError(f"No adapter is called {', '.join(sorted(unknown))}.")
    if permanent := names.intersection(replacing(model)):
        raise AdapterError(
            f"{', '.join(sorted(permanent))} replaced weights of the base, and cannot be detached; "
            "load the base anew."
        )
    for each in names:
        active_adapters.weights.pop(each, None)
    switch_modules_to_save(model)
    detach_modules_to_save(model, names)
    _detach_from_layers(model, names)
    detach_virtual_tokens(model, names)
    detach_invocations(model, names)
    for each in names:
        del active_adapters.configs[each]
        active_adapters.notes.pop(each, None)
    if not active_adapters.configs:
        remove_tokens(model)
        remove_score(model)
    return model


def check_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError if no adapter can be attached under `name`: it is taken, or unfit for a
    module's path, or the base is no longer itself, or PEFT's layers are in it."""
    if replaced_by := replacing(model):
        raise AdapterError(
            f"{replaced_by[0]} replaced weights of the base; merge() it, or load anew."
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise AdapterError(
            "This model has PEFT's adapters in it. To go on with them here, save them by "
            "model.save_pretrained(DIRECTORY) and veneer.load that over a base loaded anew; for an "
            "adapter on top of them, attach to model.merge_and_unload()."
        )
    if name in adapters(model):
        raise AdapterError(f"An adapter called {name!r} is attached already; detach it first.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"An adapter cannot be called {name!r}; choose another name.")


def adapted_layer(model: nn.Module, path: str) -> Adapted:
    """Return the adapted layer, or parameter, at a path; the base's own is wrapped if need be."""
    active_adapters = active_adapters_of(model)
    owner, name = owner_of(model, path)
    if name in owner._parameters or isinstance(owner._modules.get(name), QuantizedStack):
        wrapper = model.get_submodule(path.rpartition(".")[0])
        if not isinstance(wrapper, LoRAParameters):
            wrapper = LoRAParameters(wrapper)
            model.set_submodule(path.rpartition(".")[0], wrapper)
        return wrapper.adapt(name, active_adapters)
    module = owner.get_submodule(name)
    if isinstance(module, AdaptedLayer):
        return module
    layer: AdaptedLayer
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module, active_adapters)
    elif isinstance(module, nn.Conv2d):
        layer = LoRAConv2d(module, active_adapters)
    else:
        layer = LoRALinear(module, active_adapters, transposed=isinstance(module, Conv1D))
        layer.place = Place(type(owner), name)
    owner.set_submodule(name, layer)
    return layer


def _activate(model: nn.Module, name: str, config: LoRA) -> None:
    """Let an adapter act whose tensors are attached."""
    active_adapters_of(model).configs[name] = config
    attach_invocation(model, name, config)
    use(model, name)


def _attach_new_method(
    model: PreTrainedModel,
    name: str,
    config: Method,
    seed: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if config.method == "lora":
        raise ConfigError("The method lora is attached by a LoRA, which has its settings.")
    if config.replaces_weights:
        unfreeze(model, config)
        attach_method(model, name, config)
    else:
        virtual = new_virtual_tokens(model, config, seed=seed, tokenizer=tokenizer)
        model.requires_grad_(False)
        attach_method(model, name, config, virtual)


def _check_start(model: nn.Module, config: LoRA, targets: Sequence[Layer]) -> None:
    """Raise ConfigError where factors cannot start as `config` says, naming each such layer."""
    quantized = quantized_weights(model).values()
    if config.init == "loftq" and all(weight.published for weight in quantized):
        raise ConfigError("loftq makes up for what quantizing takes; give bits 4 or 8 too.")
    problems = [
        f"{target.path} {target.shape} has {min(target.shape)} of the {needed} that rank "
        f"{config.rank_of(target.path)} needs"
        for target in targets
        if target.is_linear
        and (needed := directions(config.init, config.rank_of(target.path))) > min(target.shape)
    ]
    if problems:
        raise ConfigError(
            f"{config.init} starts from a weight's directions: {'; '.join(problems)}."
        )
    for target in targets:
        if isinstance(target.module, nn.Conv2d) and (why := why_not_adaptable(target.module)):
            raise ConfigError(f"{target.path} cannot be adapted: {why}.")


def _detach_from_layers(model: nn.Module, names: set[str]) -> None:
    """Detach adapters from all layers, and unwrap the layers that have none left."""
    for path, layer in list(lora_layers(model)):
        for attached in (layer.adapters, layer.tokens):
            for name in names & set(attached):
                del attached[name]
        if layer.bare:
            layer.unwrap(model, path)
