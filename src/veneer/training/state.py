"""A run between two steps: everything that the next step depends on, to a checkpoint and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.adapter import Adapter
from veneer.errors import differences
from veneer.formats.checkpoint import description
from veneer.formats.state import AdapterState
from veneer.models.device import CPU, random_state, set_random_state
from veneer.processes.world import World
from veneer.training.checkpoint import Checkpoint
from veneer.training.config import CHANGEABLE
from veneer.training.optimizer import FlatAdamW


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skips: int = 0  # steps in a row, up to this one, without a finite loss and gradient
    spikes: int = 0  # steps in a row, up to this one, that were left out for their loss
    losses: list[list[float]] = field(default_factory=list)  # the last steps, and their losses
    evaluations_since_best: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    best: list[list[float]] = field(default_factory=list)  # loss and step, as many as are kept


@dataclass
class RunState:
    """What trains, its optimizer, and how far the run has come.

    weights    all that trains, by name
    adapters   the active ones by the path of their module: one that started elsewhere than at zero
               adds what it has become since
    """

    weights: Mapping[str, nn.Parameter]
    adapters: Mapping[str, Adapter]
    optimizer: FlatAdamW
    progress: Progress = field(default_factory=Progress)
    best_weights: dict[str, Tensor] | None = None

    def copy_of_weights(self) -> dict[str, Tensor]:
        """Return the weights as they are now."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def take_weights(self, values: Mapping[str, Tensor]) -> None:
        """Let the weights have these values."""
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def replicate(self, world: World) -> None:
        """Let all processes hold what the one that writes does: of starts that are computed from
        the base, two processors may have other bits, or other signs."""
        if world.size == 1:
            return
        self.optimizer.replicate(world)
        for adapter in self.adapters.values():
            for tensor in (*adapter.buffers(), *_fixed_factors(adapter).values()):
                world.copy(tensor.detach())

    def to_checkpoint(
        self, identity: Mapping[str, Any], steps: int, adapter: AdapterState | None = None
    ) -> Checkpoint:
        """Return all of it, with what else decides the run's course.

        steps: of the whole run
        adapter: what trains as an adapter that shares its memory, so that it can be read from the
        checkpoint alone.
        """
        live: dict[str, Tensor] = _prefixed("weights", self.weights)
        for path, layer in self.adapters.items():
            live |= {f"{key}/{path}": start for key, start in layer.named_buffers()}
            # LoRA-FA's random factor does not train, but all that trains depends on it.
            live |= _prefixed(f"fixed/{path}", _fixed_factors(layer))
        about: dict[str, Any] = {}
        if adapter is not None:
            about["adapter"], others = description(adapter, live)
            live |= others
        # Not beside the live ones on a device, which may be full.
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in live.items()}
        tensors |= self.optimizer.state()
        best = {name: weight.cpu() for name, weight in (self.best_weights or {}).items()}
        tensors |= _prefixed("best", best)
        for device in self._devices():
            tensors[f"rng/{device.type}"] = random_state(device)
        progress = asdict(self.progress)
        if math.isinf(self.progress.best_loss):
            progress["best_loss"] = None  # JSON has no infinity
        about |= {"identity": identity, "steps": steps}
        return Checkpoint(progress.pop("step"), tensors, progress | about)

    def differences_from(self, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> list[str]:
        """Return all that keeps a checkpoint from being an earlier state of this run."""
        stored = _shapes(_without_prefix("weights", checkpoint.tensors))
        differing = other_settings(checkpoint.identity, identity)
        # The shapes follow from the settings, where these differ.
        differing = differing or differences(stored, _shapes(self.weights))
        if "step" not in checkpoint.tensors:  # the optimizer's
            differing.append("it was written by another version of Veneer")
        return differing

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to what a checkpoint of this run holds."""
        tensors = checkpoint.tensors
        self.take_weights(_without_prefix("weights", tensors))
        for path, adapter in self.adapters.items():
            for key in ("start_A", "start_B"):
                if (start := tensors.get(f"{key}/{path}")) is not None:
                    setattr(adapter, key, start.to(adapter.lora_A))
            for key, factor in _fixed_factors(adapter).items():
                if (stored := tensors.get(f"fixed/{path}/{key}")) is not None:
                    with torch.no_grad():
                        factor.copy_(stored)
        self.optimizer.load(tensors)
        self.best_weights = _without_prefix("best", tensors) or None
        beside = ("identity", "adapter", "steps")
        progress = {k: v for k, v in checkpoint.progress.items() if k not in beside}
        self.progress = Progress(checkpoint.step, **progress)
        if self.progress.best_loss is None:
            self.progress.best_loss = math.inf
        for device in self._devices():
            if (state := tensors.get(f"rng/{device.type}")) is not None:  # written on this device
                set_random_state(device, state)

    def _devices(self) -> set[torch.device]:
        """Return the devices whose random numbers decide the course of the run."""
        return {CPU, *(weight.device for weight in self.weights.values())}


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two runs differ, so that neither can go on as the other."""
    both = [before, now]
    follows = ["alpha"] if all(s.get("alpha") == 2 * s.get("rank", 0) for s in both) else []
    left_out = {*CHANGEABLE, *follows}
    return differences(*({k: v for k, v in s.items() if k not in left_out} for s in both))


def changes_of(
    names: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """Return what settings of these names are, and what they were."""

    def shown(value: Any) -> str:
        return "not given" if value is None else f"{value:g}" if isinstance(value, float) else value

    return [f"{name} {shown(now.get(name))} ({shown(before.get(name))} before)" for name in names]


def _fixed_factors(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {key: w for key, w in adapter.named_parameters() if not w.requires_grad}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors called `prefix`/..., without it."""
    return {
        name.removeprefix(f"{prefix}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
