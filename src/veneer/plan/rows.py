"""How an architecture is written down: its layers, what they are called and how large they are.

Sizes are names that `shapes.py` gives a number: dim (the residual stream), q and kv (all heads of
queries, of keys), qkv (the three side by side), inner (the feed-forward layer), gate_up (two of
it), head_dim, words, positions, word_dim (of an embedding that is projected). A layer's bias, and
whether it is there at all, is True, False, or the setting in config.json that decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["linear", "embedding", "norm", "head"]
Setting = bool | str  # a value, or the key in config.json that holds it


@dataclass(frozen=True)
class Row:
    """A layer: `out` × `in_` numbers (a norm has `out`), and a bias of `out`."""

    path: str
    kind: Kind
    out: str
    in_: str = "1"
    bias: Setting = False
    when: Setting = True


@dataclass(frozen=True)
class Architecture:
    """How transformers builds a model type.

    names: keys of config.json that mean what the usual ones mean. defaults: values of keys that a
    config.json may leave out. settled: what follows from the others, which are all there by then.
    """

    before: tuple[Row, ...]
    stack: str  # path of the list of blocks
    block: tuple[Row, ...]
    after: tuple[Row, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settled: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    # Veneer computes its blocks as the two functions of fused/block.py.
    fused: bool = False
    # Its norms are written out in Python and keep a float32 copy, as LLaMA's RMSNorm does.
    norms_in_python: bool = True
    # Bytes that its own attention keeps of each score; 0 where Veneer's packed attention suits it.
    score_bytes: int = 0


def linear(path: str, out: str, in_: str, bias: Setting = False, when: Setting = True) -> Row:
    return Row(path, "linear", out, in_, bias, when)


def norm(path: str, out: str = "dim", bias: Setting = False, when: Setting = True) -> Row:
    return Row(path, "norm", out, bias=bias, when=when)


def layer_norm(path: str, out: str = "dim", when: Setting = True) -> Row:
    return norm(path, out, True, when)


def embedding(path: str, rows: str, dim: str = "dim") -> Row:
    return Row(path, "embedding", dim, rows)


def head(path: str, bias: Setting = False, dim: str = "dim") -> Row:
    return Row(path, "head", "words", dim, bias)


def attention(qkv_bias: Setting, o_bias: Setting, output: str = "o_proj") -> tuple[Row, ...]:
    """Return the four projections that most architectures have."""
    return (
        linear("self_attn.q_proj", "q", "dim", qkv_bias),
        linear("self_attn.k_proj", "kv", "dim", qkv_bias),
        linear("self_attn.v_proj", "kv", "dim", qkv_bias),
        linear(f"self_attn.{output}", "dim", "q", o_bias),
    )


def gated(bias: Setting = False) -> tuple[Row, ...]:
    """Return the three projections of a gated feed-forward layer (Shazeer 2020)."""
    return (
        linear("mlp.gate_proj", "inner", "dim", bias),
        linear("mlp.up_proj", "inner", "dim", bias),
        linear("mlp.down_proj", "dim", "inner", bias),
    )
