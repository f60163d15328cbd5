"""A whole run as one value: what `veneer tune` takes and recipe.yaml keeps. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.checks import PATH, Rule, check_config, of_class, one_of, whole_number
from veneer.data.rows import LongRows
from veneer.data.sources import Data, has_valid_files, spelt
from veneer.models.device_names import DEVICE
from veneer.objectives.config import ANSWERS, Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.quant.settings import Bits, LoadBits, Offload
from veneer.run_directory import DEFAULT_OUT, RunDirectory
from veneer.training.config import TrainConfig

DType = Literal["auto", "float32", "bf16"]
Shard = Literal["none", "base", "auto"]  # what each of several processes holds a part of


@dataclass(frozen=True)
class DataConfig:
    """Which rows to train on. Raises ConfigError for settings that cannot be."""

    limit: int | None = None
    """Use only this many rows, the first ones."""
    max_length: int = 1024
    """Longest row in tokens."""
    long_rows: LongRows | None = None
    """What becomes of longer rows: split keeps all, in several rows; cut keeps the beginning; drop
    leaves them out; error refuses them. If not given, texts are split and chats are cut."""
    eval_rows: int | None = None
    """Rows to hold out for evaluation, drawn at random; 0: none. Some of 100 or more unless given
    here, by --eval-data, or as a directory's valid files."""
    eval_data: Path | None = None
    """Rows to evaluate on, instead of held-out ones; else the valid files of a directory."""
    skip_bad_rows: bool = False
    """Leave out rows with faults, counting them, instead of refusing the data."""
    deduplicate: bool = False
    """Leave out rows whose tokens and labels an earlier row has, and say which."""
    new_words: str | None = None
    """Words to add to the vocabulary, comma-separated; auto: those that fall into many pieces."""

    def __post_init__(self) -> None:
        check_config(
            self,
            opening="This data cannot be used so",
            rules={
                "limit": whole_number(1),
                "max_length": whole_number(2),
                "eval_rows": whole_number(0),
                "eval_data": PATH,
                "long_rows": one_of(LongRows),
            },
            contradictions={
                "eval_rows and eval_data exclude each other": bool(
                    self.eval_rows and self.eval_data
                )
            },
        )


def _is_data(value: Any) -> bool:
    paths = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return all(map(PATH.holds, paths))


# What each field of a recipe is, on which what may go with what depends.
KINDS = {
    "model": Rule(PATH.holds, "a name or a path", str),
    "data": Rule(_is_data, "a path or several"),
    "method": of_class(Method),
    "lora": of_class(LoRA),
    "training": of_class(TrainConfig),
    "objective": of_class(Objective),
    "on_policy": of_class(OnPolicy),
    "rows": of_class(DataConfig),
    "out": PATH,
    "start_from": PATH,
}


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's course and where its result goes.

    Raises ConfigError, which lists all settings that would do nothing: of evaluation without rows
    to evaluate on, of quantization without bits, of adapters with a method that has none.
    """

    model: str
    data: Data
    method: Method = field(default_factory=Method)
    lora: LoRA = field(default_factory=LoRA)
    training: TrainConfig = field(default_factory=TrainConfig)
    objective: Objective = ANSWERS
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    rows: DataConfig = field(default_factory=DataConfig)
    device: str = "auto"
    dtype: DType = "auto"
    bits: LoadBits | None = None
    pack_head: bool = False
    shard: Shard = "auto"
    offload: Offload = "none"
    out: Path = DEFAULT_OUT
    start_from: Path | None = None

    def __post_init__(self) -> None:
        check_config(self, opening="This run cannot be", rules=KINDS)
        method = self.method.method
        of_evaluation = [
            n for n in ("keep_best", "eval_every", "patience") if getattr(self.training, n)
        ]
        usual = LoRA()
        of_adapters = [
            f.name for f in fields(LoRA) if getattr(self.lora, f.name) != getattr(usual, f.name)
        ]
        of_adapters += ["lora_plus_ratio"] * (self.training.lora_plus_ratio is not None)
        on_samples = self.objective.shape == "prompts"
        of_answers = ["long_rows"] * (self.rows.long_rows is not None)
        of_answers += ["skip_bad_rows"] * self.rows.skip_bad_rows
        of_answers += ["on_spike"] * (self.training.on_spike != "warn")
        may_choose = self.rows.eval_rows is None
        evaluates = (
            may_choose or self.rows.eval_rows or self.rows.eval_data or has_valid_files(self.data)
        )
        check_config(
            self,
            opening="This run cannot be",
            rules={"shard": one_of(Shard), "offload": one_of(Offload), "device": DEVICE},
            contradictions={
                f"{method} trains the base's own weights, which cannot be sharded": (
                    self.shard == "base" and self.method.replaces_weights
                ),
                f"{method} trains the base's own weights, which cannot be offloaded": (
                    self.offload != "none" and self.method.replaces_weights
                ),
                "a base is sharded or offloaded, not both; leave out shard or offload": (
                    self.shard == "base" and self.offload != "none"
                ),
                "pack_head would do nothing without bits; give bits 4 or 8 too": (
                    self.pack_head and self.quantized_bits is None
                ),
                "init loftq makes up for what rounding to fewer bits takes; give bits 4 or 8 too": (
                    self.lora.init == "loftq" and self.quantized_bits is None
                ),
                f"{method} trains the base's own weights, over which a teacher acts; take lora": (
                    self.objective.teacher is not None
                    and not self.objective.teacher_is_served
                    and self.method.replaces_weights
                ),
                f"reward trains a head beside an adapter of low rank; leave out method {method}": (
                    self.objective.is_ranking and method != "lora"
                ),
                f"{method} trains weights, which cannot be in {self.bits} bits": (
                    self.method.replaces_weights and self.quantized_bits is not None
                ),
                f"{' and '.join(of_evaluation)} would do nothing without rows to evaluate on; "
                "give eval_rows or eval_data too": bool(of_evaluation and not evaluates),
                f"context_parallel deals the tokens of a row, before all of which {method} has its "
                "own; leave it at 1": (
                    self.training.context_parallel > 1 and method in ("prefix", "prompt")
                ),
                "new_words act wherever they stand, before an invocation too; leave one out": (
                    self.lora.invocation is not None and self.rows.new_words is not None
                ),
                "context_parallel deals the tokens of a row, and an invocation may be another "
                "process's; leave it at 1": (
                    self.lora.invocation is not None and self.training.context_parallel > 1
                ),
                f"{', '.join(of_adapters)} would do nothing with {method}": bool(
                    of_adapters and method != "lora"
                ),
                **self.objective.against(
                    context_parallel=self.training.context_parallel,
                    replay_passes=self.training.replay_passes,
                    splits=self.rows.long_rows == "split",
                    deduplicates=self.rows.deduplicate,
                    new_words=self.rows.new_words is not None,
                ),
                **self.on_policy.against(self.objective.objective, is_on_policy=on_samples),
                f"{self.objective.objective} draws samples with an adapter of low rank that acts "
                f"on all tokens, not with {method} or an invocation": (
                    on_samples and (method != "lora" or self.lora.invocation is not None)
                ),
                f"{self.objective.objective} takes prompts of one file or directory, and none of "
                "them is held out; give others by eval_data": on_samples
                and (
                    len(spelt(self.data)) > 1
                    or bool(self.rows.eval_rows)
                    or bool(of_evaluation and not self.rows.eval_data)
                ),
                "eval_answers would do nothing without prompts to evaluate on; give eval_data": (
                    on_samples and self.on_policy.eval_answers > 1 and not self.rows.eval_data
                ),
                f"{' and '.join(of_answers)} would do nothing with samples": bool(
                    on_samples and of_answers
                ),
            },
        )

    @property
    def quantized_bits(self) -> Bits | None:
        """The bits to which the base is quantized as it is read."""
        return None if self.bits == 16 else self.bits

    @property
    def loaded_bits(self) -> LoadBits | None:
        """The bits to load the base with: weights that train are dense."""
        return 16 if self.method.replaces_weights else self.bits

    @property
    def adapter(self) -> Path:
        """Where the adapter alone goes, such as lora_adapter below `out`."""
        return RunDirectory(self.out).adapter(self.method.method)

    @property
    def merged(self) -> Path:
        """Where the merged model goes, such as lora_merged below `out`."""
        return RunDirectory(self.out).merged(self.method.method)

    @property
    def merge_command(self) -> str:
        """The command line that merges the adapter into its base."""
        return shlex.join(map(str, ("veneer", "merge", self.model, self.adapter, self.merged)))

    @property
    def what_trains(self) -> LoRA | Method:
        """The adapter, or the method that has none."""
        return self.lora if self.method.method == "lora" else self.method

    def settings(self) -> dict[str, Any]:
        """Return every setting under its flag's name, as plain values for YAML and JSON."""
        paths = spelt(self.data)
        flat: dict[str, Any] = {"model": self.model, "data": paths[0] if len(paths) == 1 else paths}
        for group in (self.method, self.lora, self.training, self.objective, self.rows):
            flat.update(asdict(group))
        flat.update(self.on_policy.settings())
        flat["targets"] = list(flat["targets"])
        if isinstance(flat["invocation"], tuple):
            flat["invocation"] = list(flat["invocation"])
        flat["eval_data"] = flat["eval_data"] and str(flat["eval_data"])
        flat |= {
            "device": self.device,
            "dtype": self.dtype,
            "bits": self.bits,
            "pack_head": self.pack_head,
        }
        flat |= {"shard": self.shard, "offload": self.offload}
        flat |= {"out": str(self.out), "from": self.start_from and str(self.start_from)}
        return flat
