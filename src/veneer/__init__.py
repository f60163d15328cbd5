"""Veneer: teach a frozen language model something new with thin low-rank layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapter.attach import attach, detach
    from veneer.adapter.certify import MergeReport, certify
    from veneer.adapter.config import LoRA
    from veneer.adapter.merge import merge
    from veneer.adapter.method import Method
    from veneer.adapter.new_tokens import add_tokens, add_words
    from veneer.adapter.use import adapters, in_use, use
    from veneer.algebra.combine import combine
    from veneer.algebra.extract import extract
    from veneer.cli.show import show
    from veneer.data.load import load_examples
    from veneer.errors import (
        AdapterError,
        ConfigError,
        DataError,
        MergeError,
        ModelError,
        TargetError,
        TrainingError,
        VeneerError,
        VeneerWarning,
    )
    from veneer.formats.adapters import load, save
    from veneer.formats.merged import write_model
    from veneer.generate.decode import answer, answers, stream
    from veneer.generate.sampling import Sampling
    from veneer.models.load import Base, load_base
    from veneer.objectives.config import Objective
    from veneer.objectives.policy_config import OnPolicy
    from veneer.training.config import TrainConfig
    from veneer.training.loop import train
    from veneer.training.many.running import Job
    from veneer.training.many.train import train_many
    from veneer.training.many.tune import tune_many
    from veneer.training.pretrain import pretrain
    from veneer.training.recipe import DataConfig, Recipe
    from veneer.training.search.config import SearchConfig
    from veneer.training.search.run import search
    from veneer.training.tune import tune
    from veneer.training.with_trainer import SaveAdapter

# Where each public name lives. It is imported when it is first asked for, so that importing
# veneer, and `veneer --help`, cost nothing and load no torch.
_HOMES = {
    "AdapterError": "errors",
    "Base": "models.load",
    "ConfigError": "errors",
    "DataConfig": "training.recipe",
    "DataError": "errors",
    "Job": "training.many.running",
    "LoRA": "adapter.config",
    "MergeError": "errors",
    "MergeReport": "adapter.certify",
    "Method": "adapter.method",
    "ModelError": "errors",
    "Objective": "objectives.config",
    "OnPolicy": "objectives.policy_config",
    "Recipe": "training.recipe",
    "Sampling": "generate.sampling",
    "SaveAdapter": "training.with_trainer",
    "SearchConfig": "training.search.config",
    "TargetError": "errors",
    "TrainConfig": "training.config",
    "TrainingError": "errors",
    "VeneerError": "errors",
    "VeneerWarning": "errors",
    "adapters": "adapter.use",
    "add_tokens": "adapter.new_tokens",
    "add_words": "adapter.new_tokens",
    "answer": "generate.decode",
    "answers": "generate.decode",
    "attach": "adapter.attach",
    "certify": "adapter.certify",
    "combine": "algebra.combine",
    "detach": "adapter.attach",
    "extract": "algebra.extract",
    "in_use": "adapter.use",
    "load": "formats.adapters",
    "load_base": "models.load",
    "load_examples": "data.load",
    "merge": "adapter.merge",
    "pretrain": "training.pretrain",
    "save": "formats.adapters",
    "search": "training.search.run",
    "show": "cli.show",
    "stream": "generate.decode",
    "train": "training.loop",
    "train_many": "training.many.train",
    "tune": "training.tune",
    "tune_many": "training.many.tune",
    "use": "adapter.use",
    "write_model": "formats.merged",
}

__all__ = [
    "AdapterError",
    "Base",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Job",
    "LoRA",
    "MergeError",
    "MergeReport",
    "Method",
    "ModelError",
    "Objective",
    "OnPolicy",
    "Recipe",
    "Sampling",
    "SaveAdapter",
    "SearchConfig",
    "TargetError",
    "TrainConfig",
    "TrainingError",
    "VeneerError",
    "VeneerWarning",
    "adapters",
    "add_tokens",
    "add_words",
    "answer",
    "answers",
    "attach",
    "certify",
    "combine",
    "detach",
    "extract",
    "in_use",
    "load",
    "load_base",
    "load_examples",
    "merge",
    "pretrain",
    "save",
    "search",
    "show",
    "stream",
    "train",
    "train_many",
    "tune",
    "tune_many",
    "use",
    "write_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from veneer.errors import nearest

        raise AttributeError(f"module 'veneer' has no attribute {name!r}{nearest(name, _HOMES)}")
    value = getattr(import_module(f"veneer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
