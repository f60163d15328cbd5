"""From a config.json to the layers of a model: every path and shape, and no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veneer.errors import ModelError, nearest
from veneer.plan.gpt_like import GPT_LIKE
from veneer.plan.llama_like import LLAMA_LIKE
from veneer.plan.rows import Architecture, Kind, Row, Setting

ARCHITECTURES: dict[str, Architecture] = LLAMA_LIKE | GPT_LIKE
# What every config.json must say, under these names or an architecture's own.
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")

# Embeddings of positions, by the names that those who have them give them.
POSITIONS = ("wpe", "embed_positions", "position_embeddings")
# Keys that scale or cap the logits of those who have them.
HEAD_SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class Part:
    """A layer with parameters: W is `out` × `in_` (a norm has in_ = 1), and a bias of `out`.

    A `tied` head has no weight of its own: it uses that of the embedding.
    """

    path: str
    kind: Kind
    out: int
    in_: int
    bias: bool = False
    block: int | None = None  # index of the transformer block, None outside of the blocks
    in_attention: bool = False
    tied: bool = False

    @property
    def parameters(self) -> int:
        return (0 if self.tied else self.out * self.in_) + (self.out if self.bias else 0)

    # What `targets.py` asks of a layer that can be adapted.

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_head(self) -> bool:
        return self.kind == "head"

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "head")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, (dim, words) of an embedding."""
        return self.out, self.in_


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights. Widths are in numbers a token: dim of the residual stream, q and
    kv of all heads together, inner of the feed-forward layer."""

    model_type: str
    parts: tuple[Part, ...]
    dim: int
    q: int
    kv: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    depth: int  # blocks
    words: int
    context: int | None
    fused: bool  # whether Veneer computes its blocks as two functions (fused/block.py)
    norms_in_python: bool
    plain_head: bool  # whether it gives the logits as they are, neither scaled nor capped
    rotary: bool  # whether q and k are turned by positions, rather than positions embedded
    activation: str
    score_bytes: int

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied head's weight once."""
        return sum(part.parameters for part in self.parts)

    @cached_property
    def quantizable(self) -> tuple[Part, ...]:
        """Every linear layer but the head: what a 4-bit or 8-bit base holds in fewer bits."""
        return tuple(part for part in self.parts if part.kind == "linear")

    @property
    def adaptable(self) -> tuple[Part, ...]:
        """Every linear layer and embedding."""
        return tuple(part for part in self.parts if part.kind != "norm")

    def in_block(self, index: int) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.block == index)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the causal (or, for RoBERTa, masked) language model that transformers
    would build from a config.json.

    Raises ModelError for an unknown model type, and for settings that are missing or cannot be,
    all of them at once.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"The model type {model_type!r} is not one that can be planned"
            f"{nearest(model_type, ARCHITECTURES)}. Known are {known}."
        )
    kind = ARCHITECTURES[model_type]
    values = dict(kind.defaults)
    # A key that is there but null means what a key that is not there means.
    values |= {kind.names.get(k, k): v for k, v in config.items() if v is not None}
    rows = (*kind.before, *kind.block, *kind.after)
    needed = list(NEEDED)
    if any(row.in_ == "positions" for row in rows) or "max_position_embeddings" in values:
        needed.append("max_position_embeddings")
    _check(values, needed, kind)
    values |= kind.settled(values)
    heads = values["num_attention_heads"]
    # As transformers does for those that have no key of the name.
    values = {
        "num_key_value_heads": heads,
        "head_dim": values["hidden_size"] // heads,
        "type_vocab_size": 0,
    } | values
    _check(values, ["intermediate_size", "num_key_value_heads", "head_dim"], kind)
    return _shape(model_type, kind, values)


def _check(values: Mapping[str, Any], names: list[str], kind: Architecture) -> None:
    own = {usual: name for name, usual in kind.names.items()}
    problems = [
        f"{own.get(name, name)} is missing"
        if name not in values
        else f"{own.get(name, name)} is {values[name]!r}, but must be a whole number of at least 1"
        for name in names
        if not isinstance(values.get(name), int) or values[name] < 1
    ]
    if problems:
        raise ModelError("This config.json cannot be planned: " + "; ".join(problems) + ".")


def _shape(model_type: str, kind: Architecture, values: Mapping[str, Any]) -> ModelShape:
    dim, heads, inner = (
        values[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    kv_heads, head_dim, words = (
        values[name] for name in ("num_key_value_heads", "head_dim", "vocab_size")
    )
    q, kv = heads * head_dim, kv_heads * head_dim
    context = values.get("max_position_embeddings")
    sizes = {
        "1": 1,
        "dim": dim,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "inner": inner,
        "gate_up": 2 * inner,
        "head_dim": head_dim,
        "words": words,
        "word_dim": values.get("word_dim", dim),
        "positions": (context or 0) + values.get("position_offset", 0),
        "token_types": values["type_vocab_size"],
    }
    tied = bool(values.get("tie_word_embeddings", False))

    def is_so(setting: Setting) -> bool:
        return setting if isinstance(setting, bool) else bool(values.get(setting, False))

    def part(row: Row, prefix: str = "", block: int | None = None) -> Part:
        first = row.path.partition(".")[0]
        return Part(
            path=prefix + row.path,
            kind=row.kind,
            out=sizes[row.out],
            in_=sizes[row.in_],
            bias=is_so(row.bias),
            block=block,
            in_attention=block is not None and ("attention" in first or "attn" in first),
            tied=row.kind == "head" and tied,
        )

    depth = values["num_hidden_layers"]
    parts = [part(row) for row in kind.before if is_so(row.when)]
    block_rows = [row for row in kind.block if is_so(row.when)]
    for i in range(depth):
        parts += [part(row, f"{kind.stack}.{i}.", i) for row in block_rows]
    parts += [part(row) for row in kind.after if is_so(row.when)]
    return ModelShape(
        model_type=model_type,
        parts=tuple(parts),
        dim=dim,
        q=q,
        kv=kv,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        depth=depth,
        words=words,
        context=context,
        fused=kind.fused
        and values.get("hidden_act", "silu") == "silu"
        and values.get("residual_multiplier", 1) == 1,
        norms_in_python=kind.norms_in_python,
        plain_head=all(values.get(key, 1) == 1 for key in HEAD_SCALES),
        rotary=not any(part.name in POSITIONS for part in parts),
        activation=str(values.get("activation_function", values.get("hidden_act", ""))),
        score_bytes=kind.score_bytes,
    )
