"""AdamW over weights that lie end to end in one buffer, in float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels.transfer import OnTheWay
from veneer.plan.config import OptimizerName
from veneer.plan.memory import LEAST
from veneer.processes.world import ALONE, World
from veneer.training.adamw8bit import BLOCK, Moments8bit

MOMENTS = ("exp_avg", "exp_avg_sq")
# What weights of one buffer have in common: dtype, device, ratio of learning rates, optimizer.
_Kind = tuple[torch.dtype, torch.device, float, OptimizerName]


@dataclass
class _Buffer:
    """The weights of one dtype, device and learning rate, and their gradients, end to end.

    All of it is allocated at once, so that none of it comes to lie between the tensors that a step
    allocates and frees.

    Weights of 16 bits have masters in float32, or most of a step's change would be rounded away
    (Micikevicius et al. 2018, section 3.1).

    With moments of 8 bits each weight begins at a multiple of BLOCK, so that it shares no scale
    with another; between them are zeros, which stay zeros.
    """

    weights: dict[str, nn.Parameter]
    values: Tensor  # (numbers of all weights,); the weights are views of it
    gradient: Tensor  # as `values`; the weights' gradients are views of it
    master: nn.Parameter  # as `values`, in float32 or wider; `values` itself where it is that
    ratio: float  # of the weights' learning rate to the optimizer's
    moments: Moments8bit | None = None  # None where they are torch's, in the master's dtype

    @classmethod
    def of(
        cls, weights: dict[str, nn.Parameter], ratio: float, optimizer: OptimizerName
    ) -> _Buffer:
        unit = 1 if optimizer == "adamw" else BLOCK
        flat = (weight.detach().flatten() for weight in weights.values())
        values = torch.cat([F.pad(x, (0, -len(x) % unit)) if len(x) % unit else x for x in flat])
        wide = torch.promote_types(values.dtype, torch.float32)
        master = nn.Parameter(values.to(wide))
        buffer = cls(weights, values, torch.zeros_like(values), master, ratio)
        if unit == BLOCK:
            buffer.moments = Moments8bit(master, paged=optimizer == "paged-adamw8bit")
        for name, view in buffer.views(values):
            weights[name].data = view
        return buffer

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight's name, and its numbers in a tensor like `values`, in its shape."""
        unit = 1 if self.moments is None else BLOCK
        sizes = [-(weight.numel() // -unit) * unit for weight in self.weights.values()]
        for (name, weight), numbers in zip(self.weights.items(), flat.split(sizes), strict=True):
            yield name, numbers[: weight.numel()].view(weight.shape)

    @cached_property
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each weight, and its numbers in `gradient`."""
        return [(self.weights[name], view) for name, view in self.views(self.gradient)]

    def scales(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight's name, and its blocks' scales in those of all."""
        sizes = [-(weight.numel() // -BLOCK) for weight in self.weights.values()]
        yield from zip(self.weights, flat.split(sizes), strict=True)

    @property
    def has_masters(self) -> bool:
        return self.master.dtype != self.values.dtype


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) with clipping, one operation for hundreds of weights.

    While it lives, the weights are views of its buffers, and from `begin` to `step` so are their
    gradients, which add up there; a weight without one has a gradient of zero. `release` gives the
    weights memory of their own again. `ratios` multiply the learning rate of the weights named.
    optimizer: its moments in 32 bits, or those of weights with LEAST numbers and more in 8.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        ratios: Mapping[str, float] | None = None,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        alike: dict[_Kind, dict[str, nn.Parameter]] = {}
        for name, weight in weights.items():
            ratio = (ratios or {}).get(name, 1.0)
            kind = optimizer if weight.numel() >= LEAST else "adamw"
            alike.setdefault((weight.dtype, weight.device, ratio, kind), {})[name] = weight
        self._buffers = [_Buffer.of(each, *kind[2:]) for kind, each in alike.items()]
        self._weight_decay, self._steps = weight_decay, 0
        self._last: OnTheWay | None = None  # of whether the last step has changed something
        wide = [buffer for buffer in self._buffers if buffer.moments is None]
        groups = [{"params": [buffer.master], "ratio": buffer.ratio} for buffer in wide]
        self._adamw: torch.optim.AdamW | None = None
        if groups:
            self._adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
            for buffer in wide:
                moments = {key: torch.zeros_like(buffer.master) for key in MOMENTS}
                step = torch.zeros((), dtype=torch.float32, device=buffer.master.device)
                self._adamw.state[buffer.master] = {"step": step, **moments}

    def begin(self) -> None:
        """Let the weights' gradients add up in the buffers from here on."""
        for buffer in self._buffers:
            for weight, view in buffer.gradients:
                weight.grad = view

    def step(
        self, *, lr: float, clip: float, world: World = ALONE, only_if: Tensor | None = None
    ) -> Tensor:
        """Add up the gradients of all processes, clip them to a norm of `clip` (0: not at all),
        update the weights, and forget the gradients. Where these are not finite, or `only_if` is
        False, everything stays as it is. Return whether it was updated, on the weights' device:
        but for paged moments nothing waits for it here.

        Processes send the gradients once, and all have the same sum: so they clip alike, and agree
        on what is finite.
        """
        for buffer in self._buffers:
            # Where there are masters this is a copy, which is freed after the step.
            buffer.master.grad = buffer.gradient.to(buffer.master.dtype)
            world.add_up(buffer.master.grad)
        masters = [buffer.master for buffer in self._buffers]
        norm = nn.utils.clip_grad_norm_(masters, clip or math.inf)
        finite = norm.isfinite()
        if only_if is not None:
            finite &= only_if.to(finite.device)
        self._update(lr, finite)
        self._to_weights()
        self.forget()
        return finite

    def _update(self, lr: float, only_if: Tensor) -> None:
        if self._in_8_bits:
            self._settle()
            self._last = OnTheWay(only_if)
        self._steps += 1
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr * group["ratio"]
            # As torch's GradScaler tells a fused optimizer to change nothing.
            self._adamw.found_inf = (~only_if).float()  # type: ignore[attr-defined]
            self._adamw.step()
        for buffer in self._buffers:
            if buffer.moments is not None:
                assert buffer.master.grad is not None
                buffer.moments.step(
                    *(buffer.master, buffer.master.grad),
                    lr=lr * buffer.ratio,
                    weight_decay=self._weight_decay,
                    step=self._steps,
                    only_if=only_if,
                )

    def _settle(self) -> None:
        """Count the last step only if it has changed something, which is known by now."""
        if self._last is not None and not all(self._last.arrived()):
            self._steps -= 1
        self._last = None

    @property
    def _in_8_bits(self) -> bool:
        return any(buffer.moments is not None for buffer in self._buffers)

    @property
    def gradients(self) -> list[Tensor]:
        """The tensors in which gradients add up, the same ones in all steps."""
        return [buffer.gradient for buffer in self._buffers]

    def forget(self) -> None:
        """Free all gradients."""
        for buffer in self._buffers:
            buffer.master.grad = None
            buffer.gradient.zero_()
            for weight in buffer.weights.values():
                weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return on the host the moments as `exp_avg/<weight>`, `exp_avg_sq/<weight>`, of those in
        8 bits the scales as `exp_avg_scales/<weight>`, masters, where there are some, as
        `master/<weight>`, and the steps that changed something."""
        tensors = {name: view.to("cpu", copy=True) for name, view in self._views()}
        self._settle()
        steps = torch.tensor(float(self._steps))
        if self._adamw is not None:  # which knows by itself of steps that changed nothing
            steps = next(iter(self._adamw.state.values()))["step"].to("cpu", copy=True)
        return tensors | {"step": steps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._steps, self._last = int(tensors["step"]), None
        if self._adamw is not None:
            for state in self._adamw.state.values():
                state["step"].copy_(tensors["step"])
        for name, view in self._views():
            view.copy_(tensors[name])
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

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a weight has in each buffer's moments, scales and master, by its name."""
        for buffer in self._buffers:
            flat: dict[str, Tensor] = {}
            if buffer.moments is not None:
                buffer.moments.wait()
                flat |= buffer.moments.codes
                for key, scales in buffer.moments.scales.items():
                    yield from ((f"{key}_scales/{w}", view) for w, view in buffer.scales(scales))
            elif self._adamw is not None:
                state = self._adamw.state[buffer.master]
                flat |= {key: state[key] for key in MOMENTS}
            if buffer.has_masters:
                flat["master"] = buffer.master.detach()
            for key, numbers in flat.items():
                yield from ((f"{key}/{w}", view) for w, view in buffer.views(numbers))

    @torch.no_grad()
    def _to_weights(self) -> None:
        for buffer in self._buffers:
            if buffer.has_masters:
                buffer.values.copy_(buffer.master)
