"""AdamW over weights that lie end to end in one buffer, in float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.processes.world import ALONE, World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Buffer:
    """The weights of one dtype, device and learning rate, and their gradients, end to end.

    All of it is allocated at once, so that none of it comes to lie between the tensors that a step
    allocates and frees.

    Weights of 16 bits have masters in float32, or most of a step's change would be rounded away
    (Micikevicius et al. 2018, section 3.1).
    """

    weights: dict[str, nn.Parameter]
    values: Tensor  # (numbers of all weights,); the weights are views of it
    gradient: Tensor  # as `values`; the weights' gradients are views of it
    master: nn.Parameter  # as `values`, in float32 or wider; `values` itself where it is that
    ratio: float  # of the weights' learning rate to the optimizer's

    @classmethod
    def of(cls, weights: dict[str, nn.Parameter], ratio: float) -> _Buffer:
        values = torch.cat([weight.detach().flatten() for weight in weights.values()])
        wide = torch.promote_types(values.dtype, torch.float32)
        master = nn.Parameter(values.to(wide))
        buffer = cls(weights, values, torch.zeros_like(values), master, ratio)
        for name, view in buffer.views(values):
            weights[name].data = view
        return buffer

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight's name, and its numbers in a tensor like `values`, in its shape."""
        slices = flat.split([weight.numel() for weight in self.weights.values()])
        for (name, weight), numbers in zip(self.weights.items(), slices, strict=True):
            yield name, numbers.view(weight.shape)

    @property
    def has_masters(self) -> bool:
        return self.master.dtype != self.values.dtype


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) with clipping, one operation for hundreds of weights.

    While it lives, the weights are views of its buffers, and from `begin` to `step` so are their
    gradients, which add up there; a weight without one has a gradient of zero. `release` gives the
    weights memory of their own again. `ratios` multiply the learning rate of the weights named.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        alike: dict[tuple[torch.dtype, torch.device, float], dict[str, nn.Parameter]] = {}
        for name, weight in weights.items():
            ratio = (ratios or {}).get(name, 1.0)
            alike.setdefault((weight.dtype, weight.device, ratio), {})[name] = weight
        self._buffers = [_Buffer.of(group, ratio) for (_, _, ratio), group in alike.items()]
        groups = [{"params": [buffer.master], "ratio": buffer.ratio} for buffer in self._buffers]
        self._adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        for buffer in self._buffers:
            moments = {key: torch.zeros_like(buffer.master) for key in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=buffer.master.device)
            self._adamw.state[buffer.master] = {"step": step, **moments}

    def begin(self) -> None:
        """Let the weights' gradients add up in the buffers from here on."""
        for buffer in self._buffers:
            for name, view in buffer.views(buffer.gradient):
                buffer.weights[name].grad = view

    def step(self, *, lr: float, clip: float, world: World = ALONE) -> bool:
        """Add up the gradients of all processes, clip them to a norm of `clip` (0: not at all),
        update the weights, and forget the gradients. Return whether they were finite; if not, the
        weights stay as they are.

        Processes send the gradients once, and all have the same sum: so they clip alike, and agree
        on what is finite.
        """
        for buffer in self._buffers:
            # Where there are masters this is a copy, which is freed after the step.
            buffer.master.grad = buffer.gradient.to(buffer.master.dtype)
            world.add_up(buffer.master.grad)
        masters = [buffer.master for buffer in self._buffers]
        norm = nn.utils.clip_grad_norm_(masters, clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self._adamw.param_groups:
                group["lr"] = lr * group["ratio"]
            self._adamw.step()
            self._to_weights()
        self.forget()
        return finite

    def forget(self) -> None:
        """Free all gradients."""
        for buffer in self._buffers:
            buffer.master.grad = None
            buffer.gradient.zero_()
            for weight in buffer.weights.values():
                weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the moments as `exp_avg/<weight>`, `exp_avg_sq/<weight>`, masters, where there are
        some, as `master/<weight>`, and the steps done."""
        tensors = {}
        for buffer in self._buffers:
            tensors["step"] = self._adamw.state[buffer.master]["step"].clone()
            for key, flat in self._state(buffer).items():
                for name, view in buffer.views(flat):
                    tensors[f"{key}/{name}"] = view.clone()
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for buffer in self._buffers:
            self._adamw.state[buffer.master]["step"].copy_(tensors["step"])
            for key, flat in self._state(buffer).items():
                for name, view in buffer.views(flat):
                    view.copy_(tensors[f"{key}/{name}"])
        self._to_weights()

    def replicate(self, world: World) -> None:
        """Let the weights be those of the process that writes."""
        for buffer in self._buffers:
            world.copy(buffer.master.detach())
        self._to_weights()

    def release(self) -> None:
        """Let the weights own their memory again, without gradients."""
        for buffer in self._buffers:
            for weight in buffer.weights.values():
                weight.data = weight.detach().clone()
                weight.grad = None

    def _state(self, buffer: _Buffer) -> dict[str, Tensor]:
        """Return the moments of a buffer, and its master where that is not the weights' own."""
        state = self._adamw.state[buffer.master]
        moments: dict[str, Tensor] = {key: state[key] for key in MOMENTS}
        return moments | ({"master": buffer.master.detach()} if buffer.has_masters else {})

    @torch.no_grad()
    def _to_weights(self) -> None:
        for buffer in self._buffers:
            if buffer.has_masters:
                buffer.values.copy_(buffer.master)
