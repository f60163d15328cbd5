"""What a decoder layer is made of, by the paths of its submodules, and how these are connected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.kernels.activation import Activation

# How q, k and v lie in what the projections give: one projection for each, or one for all, in which
# they follow one another as a whole (Phi-3, GPT-2) or within each key head (GPT-NeoX, Falcon).
Order = Literal["separate", "blocks", "by key head"]
# Which dims of a head turn together, and where their angles lie in cos and sin: i and i + pairs, as
# in LLaMA, or with each angle once, as in gpt-oss; 2i and 2i + 1 with the angles of GLM-4, or with
# each angle twice, as in Cohere.
Turn = Literal["halves", "halves, angles once", "pairs", "pairs, angles twice", "none"]


@dataclass(frozen=True, kw_only=True)
class HalfStructure:
    """y = dropout(post_norm(output(f(inputs(norm(x)))))), where f is attention or an activation.

    All are paths of submodules within the layer; a norm that is not there is None. dropout: the
    probability in training.
    """

    norm: str | None
    inputs: tuple[str, ...]
    output: str
    post_norm: str | None
    dropout: float = 0.0

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers of which the half keeps what they give."""
        return self.inputs

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.projections, self.output)


@dataclass(frozen=True, kw_only=True)
class ExpansionStructure:
    """linear(norm(latent)); a norm that is not there is None."""

    norm: str | None
    linear: str


@dataclass(frozen=True, kw_only=True)
class LatentStructure:
    """How q, k and v come from latents: the inputs are what gives q, or its latent, and what gives
    the latent of k and v and the dims that turn, one head for all. turning: these dims, the last of
    each head."""

    q: ExpansionStructure | None
    kv: ExpansionStructure
    turning: int

    @property
    def expansions(self) -> tuple[ExpansionStructure, ...]:
        return (self.kv,) if self.q is None else (self.kv, self.q)


@dataclass(frozen=True, kw_only=True)
class AttentionStructure(HalfStructure):
    """The half that mixes tokens; of each head's dims, value_dim are its value's.

    scale, window, softcap, sinks (a parameter's path): as `kernels.attention.Attention` takes them.
    score_dropout: of the probabilities, in training.
    """

    q_norm: str | None
    k_norm: str | None
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: str | None
    score_dropout: float
    latent: LatentStructure | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        expansions = () if self.latent is None else self.latent.expansions
        return (*self.inputs, *(expansion.linear for expansion in expansions))

    @property
    def read_by_heads(self) -> tuple[str, ...]:
        """The linear layers of whose outputs q, k and v are made."""
        if self.latent is None:
            return self.inputs
        q, compressed = self.inputs
        return (
            (q if self.latent.q is None else self.latent.q.linear),
            compressed,
            self.latent.kv.linear,
        )


@dataclass(frozen=True, kw_only=True)
class FeedForwardStructure(HalfStructure):
    """The half that takes each token alone. is_gated: act(gate) · up, of two projections or of one
    that gives both; otherwise act(up). activation: the path of its module, None where it is none.
    """

    activation: str | None
    is_gated: bool


@dataclass(frozen=True, kw_only=True)
class MixtureStructure:
    """The half that takes each token alone, y = post_norm(module(norm(x))), where a mixture of
    experts, a module of the layer, computes itself."""

    norm: str | None
    module: str
    post_norm: str | None


@dataclass(frozen=True, kw_only=True)
class LayerStructure:
    """A decoder layer as two halves, each added to the residual.

    parallel: both read the layer's input. returns_tuple: whether its output is the first of
    several.
    """

    attention: AttentionStructure
    feed_forward: FeedForwardStructure | MixtureStructure
    parallel: bool
    returns_tuple: bool

    @property
    def mixture(self) -> str | None:
        """The path of the module of experts, None where there is none."""
        half = self.feed_forward
        return half.module if isinstance(half, MixtureStructure) else None

    @property
    def halves(self) -> tuple[HalfStructure, ...]:
        """The halves that are one function each: both, or attention beside a mixture."""
        half = self.feed_forward
        return (self.attention, half) if isinstance(half, HalfStructure) else (self.attention,)

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(path for half in self.halves for path in half.linears)

    @property
    def norms(self) -> tuple[str, ...]:
        """The paths of all norms that the layer has."""
        attention, feed_forward = self.attention, self.feed_forward
        expansions = () if attention.latent is None else attention.latent.expansions
        norms = (
            *(attention.norm, attention.q_norm, attention.k_norm, attention.post_norm),
            *(expansion.norm for expansion in expansions),
            *(feed_forward.norm, feed_forward.post_norm),
        )
        return tuple(norm for norm in norms if norm is not None)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a layer's structure leaves open, and numbers decide.

    gate_first: of gate and up, as their projections are called or as they lie in one. multiplier:
    of what each half adds. scales_queries: by their position, as Llama 4's and Ministral's.
    prescaled: queries by 1 / sqrt(head_dim) before attention, which then does not, as OPT's.
    """

    order: Order = "separate"
    turn: Turn = "halves"
    activation: Activation = "silu"
    gate_first: bool = True
    multiplier: float = 1.0
    scales_queries: bool = False
    prescaled: bool = False
