"""What transformers' own Trainer, and TRL's that are made of it, need to know of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from veneer.formats.adapters import save
from veneer.formats.names import FormatName

ADAPTER = "adapter"  # the directory's name, in a checkpoint and in the output directory


class SaveAdapter(TrainerCallback):
    """Write the adapter to `<output_dir>/checkpoint-<step>/adapter` with each checkpoint of a
    Trainer, and to `<output_dir>/adapter` at the end, from where `veneer.load` takes it.

    `name`, `format` and `tokenizer` are those of `veneer.save`. What Trainer itself writes is the
    base under its own names with the adapter's tensors beside it, from which it resumes.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        format: FormatName = "native",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.name, self.format, self.tokenizer = name, format, tokenizer

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
        if state.is_world_process_zero:
            save(model, place, name=self.name, format=self.format, tokenizer=self.tokenizer)
