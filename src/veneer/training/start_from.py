"""A run that starts from an adapter: its settings, and its tensors in place of fresh ones."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from transformers import PreTrainedModel

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method, description
from veneer.adapter.targets import resolve
from veneer.errors import ConfigError, differences, joined
from veneer.formats.install import install
from veneer.formats.state import AdapterState
from veneer.models.load import Base
from veneer.training.begin import DEFAULT, let_train
from veneer.training.recipe import Recipe

OWN = ("dropout", "lora_fa")  # settings of training, which a run from an adapter may choose


def settled(recipe: Recipe, state: AdapterState, skeleton: PreTrainedModel) -> Recipe:
    """Return the recipe with the settings of the adapter that it starts from.

    Raises ConfigError, which lists them all, for settings that are given and are not the adapter's.
    """
    config = state.config
    if isinstance(config, Method) and config.replaces_weights:
        raise ConfigError(
            f"{recipe.start_from} holds weights of the base that were trained ({config.method}). "
            "Start from its merged model instead, as the base of this run."
        )
    method = "lora" if isinstance(config, LoRA) else config.method
    if recipe.method.method not in ("lora", method):
        _refuse(recipe, [f"method ({method!r} there, {recipe.method.method!r} here)"])
    if isinstance(config, Method):
        usual = Method(method=method) if recipe.method.method == method else Method()
        _refuse(recipe, differences(asdict(config), _given(recipe.method, usual, asdict(config))))
        return replace(recipe, method=config)
    given = _given(recipe.lora, LoRA(), asdict(config))
    if recipe.lora.alpha == 2 * recipe.lora.rank:  # as it follows from the rank
        given["alpha"] = config.alpha
    own = {name: given[name] for name in OWN}
    theirs = asdict(config) | own
    chosen = {name: getattr(recipe.lora, name) for name in ("targets", "layers")}
    if any(chosen[name] != getattr(LoRA(), name) for name in chosen):
        paths = {layer.path for layer in state.layers()}
        if {layer.path for layer in resolve(skeleton, LoRA(**chosen))} == paths:
            chosen = {}
    given |= {name: theirs[name] for name in ("targets", "layers") if name not in chosen}
    _refuse(recipe, differences(theirs, given))
    return replace(recipe, lora=replace(config, **own))


def begin(
    base: Base,
    state: AdapterState,
    what_trains: LoRA | Method,
    *,
    force: bool,
    name: str = DEFAULT,
) -> None:
    """Attach a stored adapter, all of which trains. Raises AdapterError where it does not fit."""
    model = base.model
    # In the base's dtype already, or its modules would get copies.
    modules = {path: weight.to(model.dtype) for path, weight in state.modules_to_save.items()}
    state = replace(state, config=what_trains, modules_to_save=modules)
    install(model, state, name=name, tokenizer=base.tokenizer, force=force)
    let_train(model, name)


def in_words(config: LoRA | Method) -> str:
    """Return an adapter's settings for a person."""
    if isinstance(config, Method):
        return description(config)
    return f"rank {config.rank}, alpha {config.alpha:g}, over {', '.join(config.targets)}"


def _given(ours: object, usual: object, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our settings where they are not the usual ones, and theirs elsewhere."""
    names = [field.name for field in fields(ours)]  # type: ignore[arg-type]
    own = {name: getattr(ours, name) for name in names}
    return {n: v if v != getattr(usual, n) else theirs[n] for n, v in own.items()}


def _refuse(recipe: Recipe, differing: list[str]) -> None:
    if differing:
        raise ConfigError(
            f"{recipe.start_from} has other settings: {joined(differing)}. Leave them out, and the "
            "run has the adapter's; or leave out --from, and it starts anew."
        )
