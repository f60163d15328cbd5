"""The forward methods of a model's decoder layers, replaced for the length of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from veneer.adapter.experts import routed_experts
from veneer.adapter.parameters import LoRAParameters
from veneer.fused.layers import FusedLayer
from veneer.fused.rotaries import Rotaries
from veneer.fused.watch import angles_of, attention
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Packing
from veneer.models.blocks import decoder_of

LayerForward = Callable[..., Any]


@dataclass(eq=False)
class Installation:
    """The patches of one model: they act while a pass of ours is running, and only then.

    So a call of the model between two steps (to generate, say) takes its own forward.
    attention: the name of the attention to use in a pass, or None for the model's own. packing: of
    the pass that is running, where rows are packed. checkpointed: modules that transformers' own
    checkpointing computes again; it would do so after a pass, without the patches, and does not.
    rotaries: of the pass that is running. generators: what the masks of dropout in that pass are
    drawn from, beside torch's own generator. experts: the forwards of modules inside of layers,
    which are replaced only while a pass is running: the backward pass may run a layer again.
    """

    model: PreTrainedModel
    attention: str | None
    is_running: bool = False
    packing: Packing | None = None
    checkpointed: Sequence[nn.Module] = ()
    rotaries: Rotaries = field(default_factory=Rotaries)
    experts: dict[nn.Module, LayerForward] = field(default_factory=dict)
    generators: Sequence[torch.Generator] = ()

    def __post_init__(self) -> None:
        self.decoder = decoder_of(self.model)  # to find it takes as long as a layer

    @contextmanager
    def running(
        self,
        packing: Packing | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Iterator[None]:
        """Let the patches act while the context lasts; without a packing, over the one before, and
        so for the generators."""
        before = self.is_running, self.packing, self.generators
        self.is_running, self.packing = True, packing or self.packing
        self.generators = self.generators if generators is None else generators
        checkpointed = [module for module in self.checkpointed if _is_checkpointed(module)]
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            model, name = self.model, self.attention
            ours = attention(model, self.decoder, name) if name else nullcontext()
            with ours, patched(self.experts):
                yield
        finally:
            self.is_running, self.packing, self.generators = before
            self.rotaries.forget()
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]

    @classmethod
    def of(cls, model: PreTrainedModel, attention: str | None) -> Installation:
        """Return the installation of a model as it is now."""
        return cls(model, attention, checkpointed=[*filter(_is_checkpointed, model.modules())])


class Patch:
    """A layer's forward in a run, over the one that the layer has otherwise."""

    def __init__(self, installation: Installation, original: LayerForward) -> None:
        self.installation, self.original = installation, original

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model is in no run: its layers have the copied original.
        return _unpatched, (self.original,)


class FusedForward(Patch):
    """A layer computed as two functions, wherever that is possible as its adapters act now."""

    def __init__(
        self,
        installation: Installation,
        fused: FusedLayer,
        arena: Arena,
        *,
        recompute_projections: bool,
    ) -> None:
        super().__init__(installation, fused.layer.forward)
        self.returns_tuple = fused.structure.returns_tuple
        self.layer = fused
        self.fused = partial(
            fused.forward, arena=arena, recompute_projections=recompute_projections
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        installation = self.installation
        # The model's own passes it on, and virtual tokens may have joined it.
        packing = options.get("packing") or installation.packing
        if installation.is_running and packing is not None:
            y = None
            if self.layer.is_as_proven():
                y = self.fused(
                    hidden_states,
                    position_embeddings=angles_of(args, options),
                    position_ids=options.get("position_ids"),
                    packing=packing,
                    rotaries=installation.rotaries,
                )
            if y is not None:
                return (y, None) if self.returns_tuple else y
            if installation.attention is None:
                raise NotImplementedError("the model's own attention takes no packed rows")
        return self.original(hidden_states, *args, **options)


class ExpertsForward(Patch):
    """The routed experts of a mixture, with their adapters or without, as one function."""

    def __init__(
        self,
        installation: Installation,
        module: nn.Module,
        arena: Arena,
        *,
        recompute_projections: bool,
    ) -> None:
        super().__init__(installation, module.forward)
        self.routed = partial(
            module.routed if isinstance(module, LoRAParameters) else partial(_routed, module),
            arena=arena,
            recompute_projections=recompute_projections,
        )

    def __call__(self, *args: Any, **options: Any) -> Any:
        y = self.routed(args, options)
        return self.original(*args, **options) if y is None else y


class RecomputedForward(Patch):
    """A layer of which only the input is kept: the backward pass computes it again."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.installation.is_running or not torch.is_grad_enabled():
            return self.original(*args, **options)
        return checkpoint(
            self.original, *args, use_reentrant=False, context_fn=self._contexts, **options
        )

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self._again(self.installation.packing)

    def _again(self, packing: Packing | None) -> AbstractContextManager:
        """Return the context in which the layer draws the same masks once more."""
        generators = self.installation.generators
        states = [generator.get_state() for generator in generators]

        @contextmanager
        def again() -> Iterator[None]:
            after = [generator.get_state() for generator in generators]
            with self.installation.running(packing):
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)
                try:
                    yield
                finally:
                    for generator, state in zip(generators, after, strict=True):
                        generator.set_state(state)

        return again()


@contextmanager
def patched(forwards: Mapping[nn.Module, LayerForward]) -> Iterator[None]:
    """Let layers compute by these forwards while the context lasts.

    A forward that somebody else has set over ours meanwhile stays; ours below it passes calls on.
    """
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            if layer.__dict__.get("forward") is forward:
                del layer.forward
                if (own := before[layer]) is not None:
                    layer.forward = own


def _routed(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
) -> Any:
    return routed_experts(module, {}, (*args, *kwargs.values()), **options)


def _is_checkpointed(module: nn.Module) -> bool:
    return bool(vars(module).get("gradient_checkpointing"))


def _unpatched(forward: LayerForward) -> LayerForward:
    return forward
