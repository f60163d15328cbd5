"""What accelerate's sharding cannot do with adapters, said before a Trainer begins."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.wrapper import Wrapper
from veneer.errors import ConfigError, VeneerWarning
from veneer.quant.stack import quantized_modules


def check_sharding(model: PreTrainedModel) -> None:
    """Raise ConfigError, which lists everything, where accelerate would shard a model so that an
    adapter is lost or does not train. Warn (VeneerWarning) of weights that stay whole.

    To be called while accelerate's settings are there and the model is not yet sharded.
    """
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    problems = list(_problems(model, plugin))
    if problems:
        raise ConfigError(f"This adapter cannot be trained so: {'; '.join(problems)}.")
    if plugin is not None and quantized_modules(model):
        warnings.warn(
            "FSDP2 shards parameters, and quantized weights are none: each process holds all of "
            "them.",
            VeneerWarning,
            stacklevel=2,
        )


def _problems(model: PreTrainedModel, plugin: Any) -> Iterator[str]:
    if is_deepspeed_zero3_enabled():
        yield "DeepSpeed's ZeRO 3 leaves no process a whole adapter; use stage 2, or FSDP2"
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        yield "FSDP1 flattens weights; set fsdp_version: 2"
    elif plugin.cpu_ram_efficient_loading and (lost := list(_lost_on_meta(model))):
        yield (
            f"{' and '.join(lost)} would be lost on the meta device; "
            "set fsdp_cpu_ram_efficient_loading: false"
        )
    ignored = _modules_named(plugin.ignored_modules, model)
    whole = {id(weight) for module in ignored for weight in module.parameters()}
    names = [n for n, w in model.named_parameters() if w.requires_grad and id(w) in whole]
    if names:
        yield (
            f"FSDP2 would not add up the gradients of {names[0]} and {len(names) - 1} more; "
            "change fsdp_ignored_modules"
        )


def _lost_on_meta(model: PreTrainedModel) -> Iterator[str]:
    """Yield what does not come back when accelerate loads a model from the first process."""
    if quantized_modules(model):
        yield "quantized weights"
    owners = (m for m in model.modules() if isinstance(m, Adapter | TrainedTokens))
    if any(True for owner in owners for _ in owner.buffers(recurse=False)):
        yield "what the adapter started from"
    if active_adapters_of(model).replaced:
        yield "modules to save"
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(end, Wrapper) for end in ends):
        yield "the tie of an adapted embedding and head"


def _modules_named(names: str | Iterable[nn.Module] | None, model: nn.Module) -> list[nn.Module]:
    """Return the modules that accelerate's `ignored_modules` means: a pattern, or themselves."""
    if not isinstance(names, str):
        return list(names or ())
    return [module for path, module in model.named_modules() if re.fullmatch(names, path)]
