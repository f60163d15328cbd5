"""AdamW over weights that lie end to end in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Buffer:
    """The weights of one dtype, device and learning rate. Everything is made at once, so that
    nothing that lasts lands between what a step makes and lets go."""

    weights: dict[str, nn.Parameter]
    flat: nn.Parameter  # (numbers of all weights,)
    ratio: float  # of their learning rate to the optimizer's

    @classmethod
    def of(cls, weights: dict[str, nn.Parameter], ratio: float) -> _Buffer:
        flat = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights.values()]))
        flat.grad = torch.zeros_like(flat)
        buffer = cls(weights, flat, ratio)
        for name, values in buffer.views(flat.detach()):
            weights[name].data = values
        return buffer

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight's part of a tensor that is laid out as `flat`, in its shape."""
        parts = flat.split([weight.numel() for weight in self.weights.values()])
        for (name, weight), part in zip(self.weights.items(), parts, strict=True):
            yield name, part.view(weight.shape)


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) with clipping, one operation for hundreds of weights.

    While it lives, the weights are views of its buffers, and from `begin` to `step` their gradients
    are too, where they add up; one that never came counts as zero. `release` gives the weights
    memory of their own again. `ratios` multiply the learning rate of the weights that they name.
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
        self._buffers = [_Buffer.of(some, ratio) for (_, _, ratio), some in alike.items()]
        groups = [{"params": [buffer.flat], "ratio": buffer.ratio} for buffer in self._buffers]
        self._adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        for flat in self._flats:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            self._adamw.state[flat] = {"step": step, **moments}

    @property
    def _flats(self) -> list[nn.Parameter]:
        return [buffer.flat for buffer in self._buffers]

    def begin(self) -> None:
        """Let the weights' gradients add up in the buffers from here on."""
        for buffer in self._buffers:
            assert buffer.flat.grad is not None
            for name, values in buffer.views(buffer.flat.grad):
                buffer.weights[name].grad = values

    def step(self, *, lr: float, clip: float) -> bool:
        """Clip the gradients to a norm of `clip` (0: not at all), update the weights, and forget
        the gradients. Return whether they were finite; if not, the weights stay as they are."""
        norm = nn.utils.clip_grad_norm_(self._flats, clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self._adamw.param_groups:
                group["lr"] = lr * group["ratio"]
            self._adamw.step()
        self.forget()
        return finite

    def forget(self) -> None:
        """Let all gradients go."""
        for buffer in self._buffers:
            assert buffer.flat.grad is not None
            buffer.flat.grad.zero_()
            for weight in buffer.weights.values():
                weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the moments as `exp_avg/<weight>`, `exp_avg_sq/<weight>`, and the steps done."""
        tensors = {}
        for buffer in self._buffers:
            state = self._adamw.state[buffer.flat]
            tensors["step"] = state["step"].clone()
            for key in MOMENTS:
                for name, part in buffer.views(state[key]):
                    tensors[f"{key}/{name}"] = part.clone()
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for buffer in self._buffers:
            state = self._adamw.state[buffer.flat]
            state["step"].copy_(tensors["step"])
            for key in MOMENTS:
                for name, part in buffer.views(state[key]):
                    part.copy_(tensors[f"{key}/{name}"])

    def release(self) -> None:
        """Let the weights own their memory again, without gradients."""
        for buffer in self._buffers:
            for weight in buffer.weights.values():
                weight.data = weight.detach().clone()
                weight.grad = None
