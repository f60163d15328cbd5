"""A kind of adapter: how it is attached, over which base, and what of it trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import peft
import torch
from torch import Tensor

import veneer
from support import peft_cases
from support.published_bases import published
from support.random_adapters import (
    NEW_TOKENS,
    examples,
    ids,
    shake,
    targets_named,
    tokenizer,
    with_invocation,
    with_new_tokens,
)
from support.tiny_models import VOCAB, quantized, tiny
from veneer.adapter.start import start_from_gradients
from veneer.data.encode import UNLABELLED, Example
from veneer.formats.merged import write_model

PICTURES = ("vit", "convnext")  # architectures that read no tokens


@dataclass(frozen=True)
class Kind:
    """A kind of adapter over one base.

    lora: a LoRA's settings; targets may be "embedding" or "everything", whatever the model calls
    its embedding. beside: further adapters, mixed with it by `weights`. method: what trains without
    a LoRA. peft: the name of a case of peft_cases, for what only PEFT's files bring.
    trains: matches the names of the parameters that train, and no others.
    """

    name: str
    architecture: str
    bits: int | None = None
    lora: Mapping[str, Any] | None = None
    beside: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float, ...] = (1.0,)
    method: veneer.Method | None = None
    peft: str | None = None
    new_tokens: bool = False
    trains: str = r"\.adapters\."
    training: Mapping[str, Any] = field(default_factory=dict)  # settings of TrainConfig
    on_disk: bool = False  # whether the base is read from a directory
    published: str | None = None  # the published format that it is in, of published_bases
    identity: bool = True  # a fresh one changes no bit
    merges: bool = True
    mixes_rows: bool = True  # each row of a batch may have an adapter of its own

    def __str__(self) -> str:
        base = f", {self.bits} bits" if self.bits else ""
        return f"{self.name}, {self.architecture}{base}"

    @property
    def reads_tokens(self) -> bool:
        return self.architecture not in PICTURES

    @property
    def is_virtual(self) -> bool:
        return self.method is not None and self.method.method in ("prefix", "prompt")

    @property
    def replaces_weights(self) -> bool:
        return self.method is not None and self.method.replaces_weights

    @property
    def vocabulary(self) -> int:
        return VOCAB + len(NEW_TOKENS) * self.new_tokens

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the base, the same each time."""
        name = str(dtype).removeprefix("torch.")
        if self.published:
            place, _ = published(self.architecture, self.published)
            return veneer.load_base(place, dtype=name).model
        if self.on_disk:
            return veneer.load_base(_written(self.architecture), dtype=name, bits=self.bits).model
        if self.bits:
            return quantized(self.architecture, self.bits, dtype=dtype)
        if self.reads_tokens:
            return tiny(self.architecture, dtype=dtype)
        return peft_cases.base(self.architecture).to(dtype)

    def dense(self) -> Any:
        """Return the base before it was quantized, or what a published one stands for."""
        if self.published is None:
            return tiny(self.architecture)
        place, _ = published(self.architecture, self.published)
        return veneer.load_base(place, dtype="float32", bits=16).model

    def attached(self, model: Any = None, *, seed: int = 0) -> Any:
        """Return a base with a fresh adapter on it, ready for training."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", veneer.VeneerWarning)  # of uncovered weights
            return self._attached(self.base() if model is None else model, seed)

    def _attached(self, model: Any, seed: int) -> Any:
        if self.new_tokens:
            rows = with_new_tokens(model, tokenizer()).parameters()
        if self.peft is not None:
            _attach_by_peft(model, self)
        if self.method is not None:
            veneer.attach(model, self.method, seed=seed)
        names = ["default", "second", "third"]
        for name, options in zip(names, (self.lora, *self.beside), strict=False):
            if options is not None:
                targets = targets_named(model, options.get("targets", "all"))
                config = veneer.LoRA(**{"rank": 3} | dict(options) | {"targets": targets})
                veneer.attach(model, config, name=name, seed=seed)
        if self.beside:
            veneer.use(model, dict(zip(names, self.weights, strict=False)))
            peft_cases.train_adapter(model)
            for name, weight in model.named_parameters():
                if ".adapters." in name:
                    weight.requires_grad_(True)
        if self.new_tokens:
            for row in rows:
                row.requires_grad_(True)
        return model

    def fresh(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Any:
        """Return a base with an adapter that has started and was not trained."""
        model = self.attached(self.base(dtype), seed=seed)
        start_from_gradients(model, lambda: self.logits(model).logsumexp(-1).sum())
        return model

    def shaken(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Any:
        """Return a base with an adapter whose values matter."""
        model = shake(self.fresh(dtype, seed=seed))
        if self.replaces_weights:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        return model

    def inputs(self, rows: int = 2) -> dict[str, Tensor]:
        if not self.reads_tokens:
            return peft_cases.inputs_of(self.architecture)
        tokens = ids(rows, vocabulary=self.vocabulary)
        return {"input_ids": torch.stack([with_invocation(row, self.invocation) for row in tokens])}

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on alone the adapter acts, none where it acts on all."""
        return (self.lora or {}).get("invocation", ())

    def logits(self, model: Any) -> Tensor:
        """Return a model's logits, with a gradient."""
        dtype = next(weight.dtype for weight in model.parameters())
        inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in self.inputs().items()}
        return model(**inputs, **({"use_cache": False} if self.reads_tokens else {})).logits

    @torch.no_grad()
    def says(self, model: Any) -> Tensor:
        """Return a model's logits, without a gradient."""
        return self.logits(model)

    def rows(self, lengths: list[int], **options: Any) -> list[Example]:
        rows = examples(lengths, vocabulary=self.vocabulary, **options)
        if not self.invocation:
            return rows
        changed = [with_invocation(torch.tensor(row.tokens), self.invocation) for row in rows]
        return [
            replace(row, tokens=tokens.tolist(), labels=_relabelled(row.labels, tokens))
            for row, tokens in zip(rows, changed, strict=True)
        ]


def _relabelled(labels: Sequence[int], tokens: Tensor) -> list[int]:
    return [
        UNLABELLED if own == UNLABELLED else int(t) for own, t in zip(labels, tokens, strict=True)
    ]


@cache
def _written(architecture: str) -> Path:
    place = Path(mkdtemp()) / "base"
    write_model(tiny(architecture), tokenizer(), place)
    return place


def _attach_by_peft(model: Any, kind: Kind) -> None:
    """Load a fresh adapter that PEFT wrote, and let all of it train."""
    _, options = peft_cases.CASES[kind.peft or ""]
    task = {"task_type": "CAUSAL_LM"} if kind.reads_tokens else {}
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12} | task | dict(options))
        theirs = peft.get_peft_model(kind.base(model.dtype), config)
        peft_cases.written(theirs, Path(place))
        veneer.load(model, place, force=True)
    peft_cases.train_adapter(model)
