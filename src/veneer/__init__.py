"""Veneer: teach a frozen language model something new with thin low-rank layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.algebra.combine import combine
    from veneer.algebra.extract import extract
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
    from veneer.generate.decode import answer, answers, stream
    from veneer.generate.sampling import Sampling
    from veneer.lowrank.config import LoRA
    from veneer.methods.attach import adapters, attach, detach, in_use, use
    from veneer.methods.certify import MergeReport, certify
    from veneer.methods.config import Method
    from veneer.methods.merge import merge
    from veneer.methods.vocabulary import add_words
    from veneer.models.load import Base, load_base
    from veneer.store.adapters import load, save
    from veneer.store.merged import write_model
    from veneer.training.config import TrainConfig
    from veneer.training.loop import train
    from veneer.training.pretrain import pretrain
    from veneer.training.recipe import DataConfig, Recipe
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
    "LoRA": "lowrank.config",
    "MergeError": "errors",
    "MergeReport": "methods.certify",
    "Method": "methods.config",
    "ModelError": "errors",
    "Recipe": "training.recipe",
    "Sampling": "generate.sampling",
    "SaveAdapter": "training.with_trainer",
    "TargetError": "errors",
    "TrainConfig": "training.config",
    "TrainingError": "errors",
    "VeneerError": "errors",
    "VeneerWarning": "errors",
    "adapters": "methods.attach",
    "add_words": "methods.vocabulary",
    "answer": "generate.decode",
    "answers": "generate.decode",
    "attach": "methods.attach",
    "certify": "methods.certify",
    "combine": "algebra.combine",
    "detach": "methods.attach",
    "extract": "algebra.extract",
    "in_use": "methods.attach",
    "load": "store.adapters",
    "load_base": "models.load",
    "load_examples": "data.load",
    "merge": "methods.merge",
    "pretrain": "training.pretrain",
    "save": "store.adapters",
    "stream": "generate.decode",
    "train": "training.loop",
    "tune": "training.tune",
    "use": "methods.attach",
    "write_model": "store.merged",
}

__all__ = [
    "AdapterError",
    "Base",
    "ConfigError",
    "DataConfig",
    "DataError",
    "LoRA",
    "MergeError",
    "MergeReport",
    "Method",
    "ModelError",
    "Recipe",
    "Sampling",
    "SaveAdapter",
    "TargetError",
    "TrainConfig",
    "TrainingError",
    "VeneerError",
    "VeneerWarning",
    "adapters",
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
    "stream",
    "train",
    "tune",
    "use",
    "write_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(f"veneer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
