"""Put adapters on a base, choose which act, take them off again."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
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
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.method import Method, is_virtual
from veneer.adapter.modules_to_save import base_in_place, home, place_saved, put_saved, take_saved
from veneer.adapter.new_tokens import remove_tokens
from veneer.adapter.parameters import LoRAParameters
from veneer.adapter.start import start_from_rounding
from veneer.adapter.targets import Layer, resolve
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.uncovered import uncovered
from veneer.adapter.unfreeze import unfreeze
from veneer.adapter.virtual import new_virtual_tokens
from veneer.adapter.virtual_forward import attach_virtual_tokens, detach_virtual_tokens
from veneer.adapter.weight_access import Place
from veneer.errors import AdapterError, ConfigError, VeneerWarning
from veneer.lowrank.initial import directions
from veneer.lowrank.update import LowRankUpdate, RowUpdates
from veneer.quant.weight import quantized_layers


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
            part = new_virtual_tokens(model, config, seed=seed, tokenizer=tokenizer)
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
        with base_in_place(model):
            for target in targets:
                adapted_layer(model, target.path).add(name, config, target.path, generator)
            if config.init == "loftq":
                assert isinstance(model, PreTrainedModel)
                start_from_rounding(model, name, generator)
    except BaseException:
        _take_off_layers(model, {name})
        raise
    active_adapters_of(model).configs[name] = config
    use(model, name)
    if text := uncovered(model, config):
        warnings.warn(text, VeneerWarning, stacklevel=2)
    return model


def use(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Let adapters act: one by its name, several as a mapping to weights, or none with None.

    Raises AdapterError for a name that is not attached, for virtual tokens that would not act alone
    and whole, and where something acts that cannot be put aside, for it replaced the base's own
    weights.
    """
    active_adapters = active_adapters_of(model)
    before = dict(active_adapters.weights)
    active_adapters.use(which)
    virtual = [
        name for name in active_adapters.weights if is_virtual(active_adapters.configs[name])
    ]
    if virtual and active_adapters.weights != {virtual[0]: 1.0}:
        active_adapters.weights = before
        raise AdapterError(
            f"{', '.join(virtual)} {'has' if len(virtual) == 1 else 'have'} virtual tokens, which "
            "act alone or not at all, and cannot be mixed."
        )
    if stuck := [name for name in _replacing(model) if active_adapters.weights.get(name) != 1.0]:
        active_adapters.weights = before
        raise AdapterError(
            f"{', '.join(stuck)} replaced weights of the base, and acts as long as the model does; "
            "load the base anew."
        )
    try:
        place_saved(model)
    except AdapterError:
        active_adapters.weights = before
        raise


def use_rows(model: nn.Module, rows: Sequence[str | Mapping[str, float] | None]) -> None:
    """Let each row of the next batches have adapters of its own: a name, names with weights, or
    None for the base alone. `use` ends it. For inference, with (rows, tokens) inputs.

    Raises AdapterError for a name that is not attached, or has no low-rank factors.
    """
    active_adapters = active_adapters_of(model)
    wanted = [tuple(active_adapters.checked(which).items()) for which in rows]
    named = {name for each in wanted for name, _ in each}
    if foreign := sorted(name for name in named if _acts_on_batches(model, name)):
        raise AdapterError(
            f"{', '.join(foreign)} has no low-rank factors, or more than these, and acts on "
            "whole batches."
        )
    different = list(dict.fromkeys(each for each in wanted if each))
    parts: list[dict[Hashable, LowRankUpdate]] = [{} for _ in different]
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for each, part in zip(different, parts, strict=True):
                if (pairs := layer.named(each)) and isinstance(layer, AdaptedLayer):
                    part[layer] = layer.low_rank_update(pairs, layer.compute_dtype)
    numbers = tuple(different.index(each) if each else None for each in wanted)
    active_adapters.row_updates = RowUpdates(parts, numbers)


def _acts_on_batches(model: nn.Module, name: str) -> bool:
    """Return whether an adapter has anything that single rows of a batch cannot have alone."""
    active_adapters = active_adapters_of(model)
    if isinstance(active_adapters.configs[name], Method) or name in active_adapters.saved:
        return True
    for _, layer in lora_layers(model):
        if name in layer.tokens:
            return True
        if name in layer.adapters:
            plain = isinstance(layer, LoRALinear | LoRAEmbedding)
            if not plain or layer.adapters[name].lora_bias is not None:
                return True
    return False


def adapters(model: nn.Module) -> dict[str, LoRA | Method]:
    """Return the attached adapters, by name, with their configurations."""
    return dict(active_adapters_of(model).configs)


def in_use(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that act, with their weights."""
    return dict(active_adapters_of(model).weights)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter, or all of them, off the model, in place; its own layers come back.

    New words go with the last adapter, from the model though not from the tokenizer. Returns the
    model. Raises AdapterError for a name that is not attached.
    """
    active_adapters = active_adapters_of(model)
    gone = set(active_adapters.configs) if name is None else {name}
    if unknown := gone - set(active_adapters.configs):
        raise AdapterError(f"No adapter is called {', '.join(sorted(unknown))}.")
    if stuck := gone.intersection(_replacing(model)):
        raise AdapterError(
            f"{', '.join(sorted(stuck))} replaced weights of the base, and cannot be taken off; "
            "load the base anew."
        )
    for each in gone:
        active_adapters.weights.pop(each, None)
    place_saved(model)
    take_saved(model, gone)
    _take_off_layers(model, gone)
    detach_virtual_tokens(model, gone)
    for each in gone:
        del active_adapters.configs[each]
        active_adapters.notes.pop(each, None)
    if not active_adapters.configs:
        remove_tokens(model)
    return model


def _check_start(model: nn.Module, config: LoRA, targets: Sequence[Layer]) -> None:
    """Raise ConfigError where factors cannot start as `config` says, naming each such layer."""
    if config.init == "loftq" and not quantized_layers(model):
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
    for target in targets:
        if target.kind == "parameter" and (config.dora or config.dropout):
            what = "DoRA" if config.dora else "dropout"
            raise ConfigError(f"{what} cannot be over {target.path}, a parameter of its module.")
        if isinstance(target.module, nn.Conv2d) and (why := why_not_adaptable(target.module)):
            raise ConfigError(f"{target.path} cannot be adapted: {why}.")


def _take_off_layers(model: nn.Module, names: set[str]) -> None:
    """Take adapters off all layers; those that have none left are the base's own again."""
    for path, layer in list(lora_layers(model)):
        for kept in (layer.adapters, layer.tokens):
            for each in names & set(kept):
                del kept[each]
        if layer.bare:
            layer.take_off(model, path)


def _replacing(model: nn.Module) -> list[str]:
    configs = adapters(model).items()
    return [name for name, each in configs if isinstance(each, Method) and each.replaces_weights]


def put(
    model: nn.Module,
    name: str,
    config: LoRA,
    parts: Mapping[str, Adapter],
    *,
    tokens: Mapping[str, TrainedTokens] | None = None,
    saved: Mapping[str, Tensor] | None = None,
) -> None:
    """Lay a stored adapter over the model and let it act, frozen.

    parts: adapters by the paths of layers and parameters; tokens: rows of single words by the paths
    of embedding and head; saved: weights in the place of the base's own, by their paths.
    """
    with base_in_place(model):
        for path, part in parts.items():
            adapted_layer(model, path).attach(name, part.requires_grad_(False))
        for path, rows in (tokens or {}).items():
            layer = adapted_layer(model, path)
            assert isinstance(layer, AdaptedLayer)
            layer.attach_tokens(name, rows.requires_grad_(False))
        put_saved(model, name, saved or {})
    active_adapters_of(model).configs[name] = config
    use(model, name)


def put_method(
    model: PreTrainedModel, name: str, config: Method, part: nn.Module | None = None
) -> None:
    """Let `config`, called `name`, be what acts on the model now; `part` are its virtual tokens."""
    if part is not None:
        attach_virtual_tokens(model, name, part)
    active_adapters_of(model).configs[name] = config
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


def adapted_layer(model: nn.Module, path: str) -> Adapted:
    """Return the adapted layer, or parameter, at a path, wrapping the base's own if need be."""
    active_adapters = active_adapters_of(model)
    owner, name = home(model, path)
    if name in owner._parameters:
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
