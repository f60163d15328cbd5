"""The kinds of adapters that each law is tried on: how one is attached, over which base, what of it
trains, and what it cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import peft
import pytest
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


def _lora(name: str, architecture: str, **options: Any) -> Kind:
    settings = {k: options.pop(k) for k in list(options) if k in Kind.__dataclass_fields__}
    return Kind(name, architecture, lora=options, **settings)


def _peft(case: str, trains: str = r"\.adapters\.", **options: Any) -> Kind:
    architecture = peft_cases.CASES[case][0]
    return Kind(case, architecture, peft=case, trains=trains, mixes_rows=False, **options)


def _method(name: str, architecture: str, trains: str, *, bits: int | None = None, **options: Any):
    method = veneer.Method(**options)
    able = method.replaces_weights
    return Kind(
        name,
        architecture,
        bits,
        method=method,
        trains=trains,
        identity=able,
        merges=able,
        mixes_rows=False,
    )


_VIRTUAL = r"^veneer_virtual\."
_STACKS = ["experts.gate_up_proj", "experts.down_proj"]
_MIXED = {
    "beside": ({"rank": 2}, {"rank": 1, "targets": "everything"}),
    "weights": (0.7, -1.3, 2.0),
}

KINDS: list[Kind] = [
    # Low-rank adapters on every layer and the embedding: each architecture, dense and quantized.
    _lora("lora", "falcon", targets="everything"),
    _lora("lora", "gemma", targets="everything"),
    _lora("lora", "gpt2", targets="everything"),
    _lora("lora", "gpt_neox", targets="everything"),
    _lora("lora", "llama", targets="everything"),
    _lora("lora", "minigpt", targets="everything"),
    _lora("lora", "mistral", targets="everything"),
    _lora("lora", "phi", targets="everything"),
    _lora("lora", "qwen2", targets="everything"),
    _lora("lora", "qwen3", targets="everything"),
    _lora("lora", "falcon", bits=4, targets="everything"),
    _lora("lora", "gemma", bits=8, targets="everything"),
    _lora("lora", "gpt2", bits=4, targets="everything"),
    _lora("lora", "gpt_neox", bits=8, targets="everything"),
    _lora("lora", "llama", bits=4, targets="everything"),
    _lora("attention", "gpt2", bits=8, targets="attention"),  # layers with biases under no adapter
    _lora("lora", "minigpt", bits=4, targets="everything"),
    _lora("lora", "mistral", bits=8, targets="everything"),
    _lora("lora", "phi", bits=4, targets="everything"),
    _lora("lora", "qwen2", bits=8, targets="everything"),
    _lora("lora", "qwen3", bits=4, targets="everything"),
    # Fewer layers, and such as touch the tie between embedding and head.
    _lora("attention", "gpt_neox", targets="attention", init="gaussian"),
    _lora("q and v", "mistral", targets="qv", dropout=0.5),
    _lora("mlp", "qwen3", targets="mlp", init="kaiming", dropout=0.5),
    _lora("embedding, tied", "llama", targets="embedding"),
    _lora("head, tied", "llama", targets="lm_head"),
    _lora("head", "qwen2", targets="lm_head"),
    _lora("embedding and head, tied", "llama", targets=["embed_tokens", "lm_head"]),
    _lora("embedding and head", "qwen2", targets=["embed_tokens", "lm_head"]),
    _lora("tokens and positions", "gpt2", targets=["wte", "wpe"]),
    # Scales and starts.
    _lora("rslora", "granite", rslora=True, alpha=3),
    _lora(
        "patterns",
        "olmo2",
        rank_pattern={r".*\.1\..*": 5},
        alpha_pattern={r".*\.0\..*": 1.5},
    ),
    _lora("pissa", "mistral", init="pissa"),
    _lora("pissa", "qwen2", bits=4, init="pissa"),
    _lora("olora", "phi3", init="olora"),
    _lora("olora", "gpt2", bits=8, init="olora"),
    _lora("lora_ga", "qwen3", init="lora_ga"),
    _lora("lora_ga", "llama", bits=4, init="lora_ga"),
    _lora("loftq", "llama", bits=4, init="loftq", on_disk=True, identity=False),
    _lora("lora_fa", "phi", lora_fa=True, trains=r"\.lora_B$"),
    _lora("lora+", "llama", training={"lora_plus_ratio": 6.0}),
    # DoRA.
    _lora("dora", "llama", dora=True, targets="everything"),
    _lora("dora", "gpt2", dora=True, targets="everything"),
    _lora("dora", "gemma", dora=True, targets="everything"),
    _lora("dora", "falcon", dora=True),
    _lora("dora", "gemma2", dora=True),
    _lora("dora", "qwen2", bits=4, dora=True, dropout=0.5),
    _lora("dora", "phi", bits=8, dora=True),
    _lora("dora from pissa", "llama", dora=True, init="pissa"),
    _lora("dora from olora", "minigpt", dora=True, init="olora"),
    _lora("dora from lora_ga", "mistral", dora=True, init="lora_ga"),
    # Several adapters at a time.
    _lora("mix", "llama", **_MIXED),
    _lora("mix", "gemma", **_MIXED),
    _lora("mix", "mistral", bits=4, **_MIXED),
    _lora("mix of dora", "gpt2", dora=True, **_MIXED),
    _lora("mix of dora", "llama", bits=4, dora=True, **_MIXED),
    _lora("mix of pissa", "qwen2", init="pissa", **_MIXED),
    # Other decoders, convolutions, and stacks of experts.
    _lora("lora", "gemma3"),
    _lora("lora", "mamba", mixes_rows=False),  # whose code reads the weight of dt_proj
    _lora("lora", "mamba2"),
    _lora("lora", "falcon_h1"),
    _lora("conv", "vit", targets=["projection", "q_proj"], mixes_rows=False),
    _lora("conv, dora", "vit", targets=["projection"], dora=True, mixes_rows=False),
    _lora("conv", "convnext", targets=["re:patch_embed|pwconv1"], mixes_rows=False),
    _lora("experts", "mixtral", targets=["q_proj", *_STACKS]),
    _lora("experts", "qwen2_moe", targets=_STACKS, rslora=True),
    _lora("experts", "qwen3_moe", targets=["down_proj", *_STACKS]),
    _lora("experts, all", "qwen3_moe", targets="all", expert_rank=3),
    _lora("experts, one A", "mixtral", targets=_STACKS, shared_expert_a=True),
    _lora("experts, transposed", "gpt_oss", targets=["q_proj", *_STACKS]),
    _lora("experts", "qwen2_moe", bits=4, targets=["q_proj", *_STACKS]),
    _lora("experts, transposed", "gpt_oss", bits=8, targets="all"),
    # Bases that were published quantized.
    _lora("over fp8", "qwen2", bits=8, published="fp8"),
    _lora(
        "over mxfp4",
        "gpt_oss",
        bits=4,
        published="mxfp4",
        targets=["q_proj", *_STACKS],
    ),
    # Modules to save, biases, and rows of single tokens.
    _peft("saved norms and an mlp", r"\.adapters\.|\.1\.mlp\.|norm\.weight$"),
    _peft("saved head", r"\.adapters\.|^lm_head\."),
    _peft("saved as one", r"\.adapters\.|embed_tokens\.weight$|^lm_head\."),
    _peft("saved and biases", r"\.adapters\.|bias$|dense_4h_to_h\.weight$"),
    _peft("bias all", r"\.adapters\.|bias$"),
    _peft("bias lora_only", r"\.adapters\.|[qv]_proj\.original\.bias$"),
    _peft("both biases", r"\.adapters\.|q_proj\.original\.bias$"),
    _peft("lora_bias"),
    _peft("lora_bias alone", merges=False),  # its layers have no place for a bias
    _peft("tokens", r"\.adapters\.|\.rows$"),
    _peft("tokens, tied", r"\.adapters\.|\.rows$"),
    _peft("tokens, scaled", r"\.adapters\.|\.rows$"),
    _peft("tokens of both", r"\.adapters\.|\.rows$"),
    _peft("tokens of both, tied no more", r"\.adapters\.|\.rows$"),
    _peft("all at once", r"\.adapters\.|\.rows$|norm\.weight$|[qkv]_proj\.original\.bias$"),
    _lora("new tokens", "qwen2", new_tokens=True, trains=r"\.adapters\.|\.rows$", mixes_rows=False),
    _lora("new tokens", "llama", new_tokens=True, trains=r"\.adapters\.|\.rows$", mixes_rows=False),
    # From an invocation on.
    _lora("activated", "llama", invocation=(7, 5), merges=False, mixes_rows=False),
    _lora(
        *("activated", "qwen2"),
        bits=4,
        dropout=0.5,
        invocation=(9,),
        merges=False,
        mixes_rows=False,
    ),
    # Virtual tokens.
    _method("prefix", "llama", _VIRTUAL, method="prefix", virtual_tokens=5),
    _method("prefix", "falcon", _VIRTUAL, method="prefix", virtual_tokens=5),
    _method("prefix", "gpt2", _VIRTUAL, bits=4, method="prefix", virtual_tokens=5),
    _method("prefix, mlp", "qwen2", _VIRTUAL, method="prefix", virtual_tokens=5, prefix_mlp=6),
    _method("prefix, mlp", "mistral", _VIRTUAL, method="prefix", virtual_tokens=3, prefix_mlp=6),
    _method("prompt", "mistral", _VIRTUAL, method="prompt", virtual_tokens=5),
    _method("prompt", "minigpt", _VIRTUAL, method="prompt", virtual_tokens=5),
    _method("prompt", "llama", _VIRTUAL, bits=8, method="prompt", virtual_tokens=5),
    # The base's own weights.
    _method("full", "llama", r"", method="full"),
    _method("full", "falcon", r"", method="full"),
    _method("full", "phi", r"", method="full"),
    _method("freeze", "gpt_neox", r"\.1\.", method="freeze", trained_blocks=1),
    _method("freeze, all", "minigpt", r"layers\.", method="freeze", trained_blocks=2),
    _method(
        "freeze, head",
        "qwen2",
        r"\.1\.|^lm_head",
        method="freeze",
        trained_blocks=1,
        train_head=True,
    ),
    _method(
        "freeze, tied head",
        "gpt2",
        r"\.1\.|wte",
        method="freeze",
        trained_blocks=1,
        train_head=True,
    ),
    _method(
        "freeze, norms", "gemma", r"\.1\.|norm", method="freeze", trained_blocks=1, train_norms=True
    ),
]


def each_kind(able: Callable[[Kind], bool] = lambda kind: True) -> pytest.MarkDecorator:
    """Return a decorator that runs a test with every kind that is able to be tested."""
    return pytest.mark.parametrize("kind", [kind for kind in KINDS if able(kind)], ids=str)


def is_first_of(kind: Kind, *fields: str) -> bool:
    """Return whether no kind before it has the same values in these fields."""
    alike = (each for each in KINDS if all(getattr(each, f) == getattr(kind, f) for f in fields))
    return next(alike) is kind


def is_first(kind: Kind) -> bool:
    """Return whether a kind reads tokens and is the first of its name, or plain LoRA over a dense
    base, of which there is one for each architecture."""
    alike = [each for each in KINDS if each.name == kind.name and each.reads_tokens]
    return kind in alike[:1] or (kind in alike and kind.name == "lora" and not kind.bits)
