"""Put adapters on a base, choose which act, take them off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from veneer.errors import AdapterError, ConfigError, VeneerWarning
from veneer.frozen.packed import named_frozen
from veneer.lowrank.adapter import Adapter
from veneer.lowrank.config import LoRA
from veneer.lowrank.initial import directions
from veneer.lowrank.layers import AdaptedLayer, LoRAEmbedding, LoRALinear, lora_layers
from veneer.lowrank.reading import Place
from veneer.methods.config import Method, is_virtual
from veneer.methods.left_out import left_out
from veneer.methods.route import route_of
from veneer.methods.start import start_from_rounding
from veneer.methods.targets import Layer, resolve
from veneer.methods.unfreeze import unfreeze
from veneer.methods.virtual import fresh, put_virtual, take_virtual
from veneer.methods.vocabulary import remove_words


def attach(
    model: nn.Module,
    config: LoRA | Method,
    *,
    name: str = "default",
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """Lay a fresh adapter called `name` over `model`, in place, and let it act and train.

    The model's outputs stay exactly as they were, as long as B A is what it started at (zero, most
    often); only loftq, which makes up for what packing took, moves them nearer to the base's.
    Everything but the new adapter is frozen. A `seed` makes the random start of A repeatable
    without touching torch's own.
    A `Method` trains something else: weights of the base, or virtual tokens. These change what the
    model says from the start, as if the words they start from stood in front of every text; the
    `tokenizer` is for a `prompt_text`.
    Warns (VeneerWarning) of weights that `all` or `mlp` may seem to mean and that no adapter lies
    over, such as experts that are one parameter.
    Returns the model. Raises TargetError for targets that match nothing, AdapterError for a name
    that is taken, ConfigError for a method or a start that does not suit the model, ModelError
    where loftq finds no weights from before packing.
    """
    check_name(model, name)
    if isinstance(config, Method) and config.method == "lora":
        raise ConfigError("The method lora is laid over a model by a LoRA, which says how.")
    if isinstance(config, Method):
        assert isinstance(model, PreTrainedModel)
        if config.replaces_weights:
            unfreeze(model, config)
            put_method(model, name, config)
        else:
            part = fresh(model, config, seed=seed, tokenizer=tokenizer)
            model.requires_grad_(False)
            put_method(model, name, config, part)
        return model
    if config.init == "auto":
        is_minigpt = getattr(getattr(model, "config", None), "model_type", None) == "minigpt"
        config = replace(config, init="gaussian" if is_minigpt else "kaiming")
    targets = resolve(model, config)
    _check_start(model, config, targets)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    try:
        for target in targets:
            adapted_layer(model, target.path).add(name, config, target.path, generator)
        if config.init == "loftq":
            assert isinstance(model, PreTrainedModel)
            start_from_rounding(model, name, generator)
    except BaseException:
        _take_off_layers(model, {name})
        raise
    route_of(model).configs[name] = config
    use(model, name)
    if text := left_out(model, config):
        warnings.warn(text, VeneerWarning, stacklevel=2)
    return model


def use(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Let adapters act: one by its name, several as a mapping to weights, or none with None.

    Raises AdapterError for a name that is not attached, for virtual tokens that would not act alone
    and whole, and where something acts that cannot be put aside, for it replaced the base's own
    weights.
    """
    route = route_of(model)
    before = dict(route.weights)
    route.use(which)
    virtual = [name for name in route.weights if is_virtual(route.configs[name])]
    if virtual and route.weights != {virtual[0]: 1.0}:
        route.weights = before
        raise AdapterError(
            f"{', '.join(virtual)} {'has' if len(virtual) == 1 else 'have'} virtual tokens, which "
            "act alone or not at all, and cannot be mixed."
        )
    if stuck := [name for name in _replacing(model) if route.weights.get(name) != 1.0]:
        route.weights = before
        raise AdapterError(
            f"{', '.join(stuck)} replaced weights of the base, and acts as long as the model does; "
            "load the base anew."
        )


def adapters(model: nn.Module) -> dict[str, LoRA | Method]:
    """Return the attached adapters, by name, with their configurations."""
    return dict(route_of(model).configs)


def in_use(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that act, with their weights."""
    return dict(route_of(model).weights)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter, or all of them, off the model, in place; its own layers come back.

    New words go with the last adapter, from the model though not from the tokenizer. Returns the
    model. Raises AdapterError for a name that is not attached.
    """
    route = route_of(model)
    gone = set(route.configs) if name is None else {name}
    if unknown := gone - set(route.configs):
        raise AdapterError(f"No adapter is called {', '.join(sorted(unknown))}.")
    if stuck := gone.intersection(_replacing(model)):
        raise AdapterError(
            f"{', '.join(sorted(stuck))} replaced weights of the base, and cannot be taken off; "
            "load the base anew."
        )
    _take_off_layers(model, gone)
    take_virtual(model, gone)
    for each in gone:
        del route.configs[each]
        route.weights.pop(each, None)
    if not route.configs:
        remove_words(model)
    return model


def _check_start(model: nn.Module, config: LoRA, targets: Sequence[Layer]) -> None:
    """Raise ConfigError where factors cannot start as `config` says, naming each such layer."""
    if config.init == "loftq" and not named_frozen(model):
        raise ConfigError("loftq makes up for what packing takes; give bits 4 or 8 too.")
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


def _take_off_layers(model: nn.Module, names: set[str]) -> None:
    """Take adapters off all layers; those that have none left are the base's own again."""
    for path, layer in list(lora_layers(model)):
        for each in names & set(layer.adapters):
            del layer.adapters[each]
        if not layer.adapters:
            model.set_submodule(path, layer.original)


def _replacing(model: nn.Module) -> list[str]:
    configs = adapters(model).items()
    return [name for name, each in configs if isinstance(each, Method) and each.replaces_weights]


def put(model: nn.Module, name: str, config: LoRA, parts: Mapping[str, Adapter]) -> None:
    """Lay a stored adapter, given as {path: Adapter}, over the model and let it act, frozen."""
    for path, part in parts.items():
        adapted_layer(model, path).put(name, part.requires_grad_(False))
    route_of(model).configs[name] = config
    use(model, name)


def put_method(
    model: PreTrainedModel, name: str, config: Method, part: nn.Module | None = None
) -> None:
    """Let `config`, called `name`, be what acts on the model now; `part` are its virtual tokens."""
    if part is not None:
        put_virtual(model, name, part)
    route_of(model).configs[name] = config
    use(model, name)


def check_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError if `name` is taken, cannot be part of a parameter's path, or would lie
    over a base that is no longer itself."""
    if replacing := _replacing(model):
        raise AdapterError(
            f"{replacing[0]} replaced weights of the base; merge() it, or load anew."
        )
    if name in adapters(model):
        raise AdapterError(f"An adapter called {name!r} is attached already; detach it first.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"An adapter cannot be called {name!r}; choose another name.")


def adapted_layer(model: nn.Module, path: str) -> AdaptedLayer:
    """Return the adapted layer at `path`, wrapping the base's own layer there if need be."""
    module = model.get_submodule(path)
    if isinstance(module, AdaptedLayer):
        return module
    route = route_of(model)
    layer: AdaptedLayer
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module, route)
    else:
        layer = LoRALinear(module, route, transposed=isinstance(module, Conv1D))
        owner, _, own_name = path.rpartition(".")
        layer.place = Place(type(model.get_submodule(owner)), own_name)
    model.set_submodule(path, layer)
    return layer
