"""What transformers' own Trainer, and TRL's that are made of it, need to know of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from veneer.adapter.use import adapters, replacing
from veneer.adapter.wrapper import INNER
from veneer.formats.adapters import save
from veneer.formats.names import FormatName
from veneer.models.fingerprint import base_parameters
from veneer.processes.sharded import is_sharded
from veneer.training.with_accelerate import check_sharding

ADAPTER = "adapter"  # the directory's name, in a checkpoint and in the output directory


class SaveAdapter(TrainerCallback):
    """Write the adapter to `<output_dir>/checkpoint-<step>/adapter` with each checkpoint of a
    Trainer, and to `<output_dir>/adapter` at the end, from where `veneer.load` takes it.

    `name`, `format` and `tokenizer` are those of `veneer.save`. Trainer's own checkpoints, and what
    its `save_model` writes, hold what trains and nothing of the frozen base; it resumes from them.
    Among several processes the first one writes; FSDP2 adds checkpoints of its own, with the base.
    Raises ConfigError where accelerate's settings would lose the adapter.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        format: FormatName = "native",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.name, self.format, self.tokenizer = name, format, tokenizer

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not is_sharded(kwargs["model"]):
            check_sharding(kwargs["model"])
        # On this model alone; Trainer writes and reads by these two.
        for method in (save_pretrained, load_state_dict):
            setattr(kwargs["model"], method.__name__, MethodType(method, kwargs["model"]))

    on_train_begin = on_init_end  # of a callback that was added later

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        place = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self._save(state, kwargs["model"], place / ADAPTER)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._save(state, kwargs["model"], Path(str(args.output_dir), ADAPTER))

    def _save(self, state: TrainerState, model: Any, place: Path) -> None:
        if state.is_world_process_zero or is_sharded(model):  # then all of them must
            save(model, place, name=self.name, format=self.format, tokenizer=self.tokenizer)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write a model as its class does, but without the frozen base where there is an adapter."""
    frozen = _frozen(model)
    left_out = frozen | _second_names(model)
    tensors = model.state_dict() if state_dict is None else state_dict
    trained = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    type(model).save_pretrained(model, save_directory, state_dict=trained, **options)
    if frozen:  # nobody is to read a whole model from there, most of it random
        Path(save_directory, CONFIG_NAME).unlink(missing_ok=True)


def load_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor], strict: bool = True, **options: Any
) -> Any:
    """Load as a model's class does; that the whole frozen base is missing is as it should be, and
    so are second names of a tensor."""
    result = type(model).load_state_dict(model, state_dict, strict=False, **options)
    frozen, second = _frozen(model), _second_names(model)
    missing = {key: key.replace(INNER, "") for key in result.missing_keys}
    expected = second | frozen if frozen <= {*missing.values()} else second
    result.missing_keys[:] = [key for key, name in missing.items() if name not in expected]
    if strict and (wrong := [*result.missing_keys, *result.unexpected_keys]):
        raise RuntimeError(f"These tensors are missing or not expected: {', '.join(wrong)}.")
    return result


def _second_names(model: PreTrainedModel) -> set[str]:
    """Return further names of the adapter's tensors in a state dict: embedding and head share rows
    of tokens, and files hold a tensor once."""
    base = base_parameters(model, every_name=True)
    names: dict[int, str] = {}
    return {
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in base and names.setdefault(id(tensor), name) != name
    }


def _frozen(model: PreTrainedModel) -> set[str]:
    """Return the base's weights that do not train, by the names of a state dict; none where no
    adapter is attached, or where the base's own weights train."""
    if not adapters(model) or replacing(model):
        return set()
    live = model.state_dict(keep_vars=True)
    base = base_parameters(model, every_name=True)
    return {name for name in base if name in live and not live[name].requires_grad}
