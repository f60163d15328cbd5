"""AdamW with moments of 8 bits, by bitsandbytes' functions (Dettmers et al. 2022, "8-bit Optimizers
via Block-wise Quantization")."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.models.device import synchronize
from veneer.plan.config import OptimizerName

BLOCK = 256  # moments of a weight that share a scale, as bitsandbytes has it (optim/optimizer.py)
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which FlatAdamW has
# Numbers of one call, a multiple of BLOCK: it counts them in 32 bits, and what they were is kept
# meanwhile.
AT_ONCE = 2**26
# Kinds of devices for which bitsandbytes has the functions; paged moments are in CUDA's managed
# memory.
RUNS_ON: dict[OptimizerName, tuple[str, ...]] = {
    "adamw8bit": ("cpu", "cuda", "xpu"),
    "paged-adamw8bit": ("cuda",),
}


def check_optimizer(name: OptimizerName, device: torch.device) -> None:
    """Raise ConfigError, with what runs, for an optimizer that does not run on a device."""
    kinds = RUNS_ON.get(name)
    if kinds is None or device.type in kinds:
        return
    others = [other for other, those in RUNS_ON.items() if device.type in those]
    raise ConfigError(
        f"--optimizer {name} runs on {' and '.join(kinds)} alone, and this run is on {device.type}."
        f" Take {' or '.join(['adamw', *others])}."
    )


class Moments8bit:
    """Both moments of a flat parameter: codes (numbers,), and a scale for each BLOCK of them.

    The numbers are a multiple of BLOCK. paged: codes are in managed memory, from which CUDA takes
    the pages to the host where the card has no room.
    """

    def __init__(self, like: Tensor, *, paged: bool = False) -> None:
        import bitsandbytes.functional as bnb  # takes a second

        count, device = like.numel(), like.device
        self.paged = paged
        self._host_decides = paged or device.type == "cpu"
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self._maps = [bnb.create_dynamic_map(signed).to(device) for signed in (True, False)]
        for key in ("exp_avg", "exp_avg_sq"):
            if paged:
                self.codes[key] = bnb.get_paged(count, dtype=torch.uint8, device=device).zero_()
            else:
                self.codes[key] = torch.zeros(count, dtype=torch.uint8, device=device)
            self.scales[key] = torch.zeros(count // BLOCK, dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(
        self,
        weight: Tensor,
        gradient: Tensor,
        *,
        lr: float,
        weight_decay: float,
        step: int,
        only_if: Tensor,
    ) -> None:
        """Update a flat weight in place, unless `only_if` is False. step: how many there were, with
        this one.

        The card is not waited for, but where moments are paged: then the host has to know whether
        anything changes, for it cannot keep what was there in the card's order.
        """
        if self._host_decides and not bool(only_if):
            return
        flat = (weight, gradient, *self.codes.values())
        for numbers, scales in zip(
            zip(*(tensor.split(AT_ONCE) for tensor in flat), strict=True),
            zip(*(tensor.split(AT_ONCE // BLOCK) for tensor in self.scales.values()), strict=True),
            strict=True,
        ):
            w, g, first, second = numbers
            changed = [] if self._host_decides else [w, first, second, *scales]
            before = [tensor.clone() for tensor in changed]
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                *("adam", g, w, first, second, *BETAS, 0.0, 0.0, EPS, step, lr),
                *(*self._maps, *scales, weight_decay, 1.0, False),
            )
            for tensor, old in zip(changed, before, strict=True):
                torch.where(only_if, tensor, old, out=tensor)

    def wait(self) -> None:
        """Return when the host may read and write the codes: it shares paged ones with the card."""
        if self.paged:
            synchronize(self._maps[0].device)
