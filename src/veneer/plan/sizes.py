"""The widths of a model that decide its memory, read from its layers' shapes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from veneer.adapter.method import Method, MethodName
from veneer.adapter.virtual import virtual_shape
from veneer.errors import ConfigError
from veneer.fused.recognise import structures
from veneer.fused.structure import LayerStructure
from veneer.fused.watch import attention_is_asked_for
from veneer.models.context import own_context
from veneer.models.description import Layer, ModelDescription
from veneer.plan.sdpa import keeps_scores
from veneer.plan.stored import Stored

# Layers that lead out of attention: their input is its output, not the residual stream.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# Names of the setting for how many experts compute a token.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
# Bytes that a model's own attention keeps of each score: with caps (scores, and probabilities in
# float32 and in the dtype of computing), and without.
CAPPED_SCORES, OWN_SCORES = 8, 4


@dataclass(frozen=True)
class Block:
    """One decoder layer: its layers, and its widths in numbers a token.

    q, kv: of all heads together. inner: of the feed-forward layers, and of the experts that compute
    a token. state: of a state-space layer's state. structure: as two functions (fused/), None for a
    block that is not likely computed so. kind: a number that all blocks of the model share whose
    layers are equal but for the block's index.
    """

    layers: tuple[Layer, ...]
    dim: int
    heads: int
    experts: int  # how many compute a token, 0 for none
    structure: LayerStructure | None
    kind: int

    @cached_property
    def attention(self) -> tuple[Layer, ...]:
        """The linear layers of attention."""
        return tuple(layer for layer in self.layers if layer.is_linear and layer.in_attention)

    @property
    def attention_heads(self) -> int:
        """Heads of attention, 0 in a block without it."""
        return self.heads if self.attention else 0

    @cached_property
    def output(self) -> Layer | None:
        """The layer that leads out of attention."""
        back = [layer for layer in self.attention if layer.out == self.dim]
        named = [layer for layer in back if layer.name in OUTPUTS]
        return next(reversed(named or back), None)

    @cached_property
    def q(self) -> int:
        return self.output.in_ if self.output else 0

    @cached_property
    def kv(self) -> int:
        """The mean width of keys and values."""
        outs = sum(layer.out for layer in self.attention if layer is not self.output)
        return max(0, outs - self.q) // 2

    @cached_property
    def feed_forward(self) -> tuple[Layer, ...]:
        """The linear layers outside of attention and experts."""
        return tuple(
            layer
            for layer in self.layers
            if layer.is_linear and not layer.in_attention and not _is_expert(layer)
        )

    @cached_property
    def expert_layers(self) -> tuple[Layer, ...]:
        return tuple(x for x in self.layers if x.is_stack or _is_expert(x))

    @cached_property
    def expert_count(self) -> int:
        """How many experts there are, whether or not they compute a token."""
        single = {x.path.rpartition(".")[0] for x in self.expert_layers if x.is_linear}
        stacks = [x.oriented[0] for x in self.expert_layers if not x.is_linear]
        return max(stacks, default=len(single))

    @cached_property
    def expert_width(self) -> int:
        """The inner width of one expert, however its weights lie; gate and up may be one weight."""
        shapes = [
            sorted(x.stored[-2:], key=lambda size: size == self.dim) for x in self.expert_layers
        ]
        return min((size for size, other in shapes if other == self.dim), default=0)

    @property
    def routed(self) -> int:
        """The inner width of the experts that compute a token."""
        return self.experts * self.expert_width

    @cached_property
    def experts_with_biases(self) -> tuple[Layer, ...]:
        return tuple(x for x in self.layers if x.is_stack or ".experts." in x.path)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of all experts, with their biases."""
        return sum(layer.parameters for layer in self.experts_with_biases)

    @property
    def idle(self) -> int:
        """Parameters of the experts that a token is not routed to."""
        if not self.routed:
            return 0
        return self.expert_parameters * (self.expert_count - self.experts) // self.expert_count

    def reached(self, tokens: int) -> float:
        """Return how many experts compute one token at least, in the mean, if each token takes its
        experts at random."""
        count = self.expert_count
        return count * (1 - (1 - self.experts / count) ** tokens)

    @cached_property
    def dense(self) -> int:
        """The inner width of the feed-forward layers."""
        back = [layer for layer in self.feed_forward if layer.out == self.dim]
        wide = [layer for layer in back if layer.in_ != self.dim] or back[-1:]
        return sum(layer.in_ for layer in wide)

    @property
    def inner(self) -> int:
        return self.dense + self.routed

    @cached_property
    def is_gated(self) -> bool:
        """Whether two products of the inner width are multiplied (Shazeer 2020)."""
        outs = sum(layer.out for layer in self.feed_forward if layer.in_ == self.dim)
        return self.routed > 0 or outs >= 2 * self.dense > 0

    @cached_property
    def state(self) -> int:
        """Numbers of a Mamba layer's state for each token: inner · state size."""
        scans = [layer for layer in self.layers if _is_scan(layer) and len(layer.stored) == 2]
        return sum(layer.out * layer.in_ for layer in scans)

    @cached_property
    def norms(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "norm")

    @property
    def has_one_norm(self) -> bool:
        """Whether attention and feed-forward run in parallel on the output of one norm."""
        return sum(x.out == self.dim and not x.in_attention for x in self.norms) == 1

    def norm_width(self, norm: Layer) -> int:
        """Return how many numbers a token a norm reads: a norm of one head reads all heads."""
        size = norm.out * norm.in_
        if not (norm.in_attention and self.heads and size == self.q // self.heads):
            return size
        of_queries = any(name.startswith("q") for name in norm.inner_path.split("."))
        return self.q if of_queries else self.kv


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, in numbers a token, and how it computes."""

    description: ModelDescription
    stored: Stored | None = None  # how its files are quantized

    @cached_property
    def config(self) -> Any:
        return self.description.config

    @cached_property
    def dim(self) -> int:
        """The width of the residual stream."""
        head, embedding = self.description.head, self.description.embedding
        layer = head.in_ if head else embedding.out if embedding else 0
        return _first_number(self.config, ("hidden_size",)) or layer

    @cached_property
    def vocab(self) -> int:
        """Tokens of the vocabulary that have logits."""
        head = self.description.head or self.description.embedding
        return head.out if head is not None and head.is_head else head.in_ if head else 0

    @property
    def heads(self) -> int:
        return max((block.heads for block in self.blocks), default=0)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        by_block = self.description.by_block
        configs = [self.config] * len(by_block)
        if self.config.is_heterogeneous:
            configs = list(self.config.per_layer_config)
        kinds: dict[Hashable, int] = {}
        blocks = []
        for layers, config, structure in zip(by_block, configs, self._structures, strict=True):
            heads = _first_number(config, ("num_attention_heads",))
            experts = _first_number(config, EXPERTS_PER_TOKEN)
            widths = (tuple(map(_kind, layers)), heads, experts, structure)
            kind = kinds.setdefault(widths, len(kinds))
            blocks.append(Block(layers, self.dim, heads, experts, structure, kind))
        return tuple(blocks)

    @property
    def _structures(self) -> list[LayerStructure | None]:
        """The structure of each block that is likely computed as two functions (fused/forward.py).

        None is where rows cannot be packed: beside scans, or in a model that attends by its own
        code in some block.
        """
        depth = len(self.description.by_block)
        none: list[LayerStructure | None] = [None] * depth
        if any(_is_scan(layer) for layer in self.description.layers):
            return none
        read = [
            None if isinstance(structure, str) else structure
            for structure in structures(self.description.model)
        ]
        suits = len(read) == depth and (self.attends_by_name or None not in read)
        return read if suits else none

    @property
    def prefix_shape(self) -> tuple[int, ...]:
        """Shape of the keys and values of a virtual token: (layers, 2, kv_heads, 1, head_dim).

        Raises ConfigError for a model with layers that have none.
        """
        return _or_raise(self._prefix_shape)

    @property
    def prompt_shape(self) -> tuple[int, ...]:
        """Shape of the embedding of a virtual token: (1, dim). Raises ConfigError for a model that
        takes no virtual tokens."""
        return _or_raise(self._prompt_shape)

    # Errors are kept as well: each comparison of methods asks again, and a forward of 61 blocks
    # on the meta device takes a second.
    @cached_property
    def _prefix_shape(self) -> tuple[int, ...] | ConfigError:
        return self._virtual_shape("prefix")

    @cached_property
    def _prompt_shape(self) -> tuple[int, ...] | ConfigError:
        return self._virtual_shape("prompt")

    def _virtual_shape(self, method: MethodName) -> tuple[int, ...] | ConfigError:
        try:
            return virtual_shape(self.description.model, Method(method, virtual_tokens=1))
        except ConfigError as error:
            return error
        except Exception as error:  # many kinds: not all models compute on the meta device
            return ConfigError(f"{method} cannot be planned for this model ({error}).")

    def quantized(self, *, as_stored: bool, head: bool) -> list[Layer]:
        """Return the layers that are quantized: in the files if `as_stored`, else by --bits."""
        description, stored = self.description, self.stored
        layers = list(description.quantizable)
        if as_stored and stored is not None and stored.experts_alone:
            return [layer for layer in layers if layer.is_stack]
        if head and description.head is not None:
            layers.append(description.head)
        return layers

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that compute a token: all but the experts that it is not routed to."""
        return self.description.parameters - sum(block.idle for block in self.blocks)

    def block_of(self, layer: Layer) -> int:
        """Return the lowest block that a layer's gradient passes: the number of blocks for the
        head, and 0 for other layers outside of the blocks."""
        if layer.is_head:
            return len(self.blocks)
        inside = layer.path.startswith(f"{self.description.blocks}.")
        return layer.block if inside and layer.block is not None else 0

    @cached_property
    def kinds_of_block(self) -> tuple[Block, ...]:
        """One block of each set of widths."""
        widths = {(x.q, x.kv, x.inner, len(x.layers), bool(x.attention)): x for x in self.blocks}
        return tuple(widths.values())

    @cached_property
    def has_uncounted_states(self) -> bool:
        """Whether there are states that the plan does not count: of Mamba 2 and gated linear
        attention."""
        return any(_is_scan(x) and len(x.stored) == 1 for x in self.description.layers)

    @property
    def inner(self) -> int:
        """The inner width of the widest feed-forward layer."""
        return max((block.inner for block in self.blocks), default=0)

    @property
    def q(self) -> int:
        return max((block.q for block in self.blocks), default=0)

    @property
    def kv(self) -> int:
        return max((block.kv for block in self.blocks), default=0)

    @cached_property
    def head_dim(self) -> int:
        return self.q // self.heads if self.heads else 0

    @cached_property
    def context(self) -> int | None:
        """The most tokens in a row that the model reads."""
        return own_context(self.config)

    @cached_property
    def norms_in_python(self) -> bool:
        """Whether norms are computed in Python and keep a float32 copy, as LLaMA's do."""
        norms = [layer.module for layer in self.description.layers if layer.kind == "norm"]
        return any(not isinstance(norm, nn.LayerNorm | nn.RMSNorm) for norm in norms)

    @cached_property
    def is_rotary(self) -> bool:
        """Whether q and k have rotary embeddings."""
        modules = self.description.model.modules()
        return any("rotary" in type(module).__name__.lower() for module in modules)

    @cached_property
    def activation(self) -> str:
        names = ("activation_function", "hidden_act", "hidden_activation")
        return next((str(getattr(self.config, x)) for x in names if hasattr(self.config, x)), "")

    @cached_property
    def attends_by_name(self) -> bool:
        """Whether the model's code asks for its attention by name, and so can get Veneer's."""
        return attention_is_asked_for(self.description.model)

    @cached_property
    def score_bytes(self) -> int:
        """Bytes that attention keeps of each score; 0 if Veneer's packed attention suits it."""
        if self.attends_by_name:
            return 0
        if getattr(self.config, "attn_logit_softcapping", None):
            return CAPPED_SCORES
        if not self.description.model._supports_sdpa:
            return OWN_SCORES
        # Falcon, which calls torch's attention itself, with one key for all heads or one for each.
        shares = getattr(self.config, "multi_query", False)
        shares &= not getattr(self.config, "new_decoder_architecture", False)
        return OWN_SCORES if keeps_scores(self.heads, 1 if shares else self.heads) else 0


def _kind(layer: Layer) -> Hashable:
    """Return all that decides how a layer of a block is planned: everything but the block's index
    in its path."""
    return (
        *(layer.inner_path, type(layer.module), layer.kind, layer.stored, layer.transposed),
        *(layer.bias, layer.parameters, layer.in_attention, layer.is_head, layer.parameter),
    )


def _or_raise(outcome: tuple[int, ...] | ConfigError) -> tuple[int, ...]:
    if isinstance(outcome, ConfigError):
        raise outcome
    return outcome


def _is_scan(layer: Layer) -> bool:
    return layer.name == "A_log"


def _is_expert(layer: Layer) -> bool:
    return layer.is_linear and ".experts." in layer.path


def _first_number(config: Any, names: tuple[str, ...]) -> int:
    values = (_setting(config, name) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


def _setting(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own, for settings that differ from layer to layer
        return None
