"""What the pretend GPU and the watch over it do, in single operations."""

import copy
from collections.abc import Callable
from contextlib import suppress
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.nn import functional as F

from support.fake_card import CARD, card, on_card
from veneer.kernels.transfer import OnTheWay


def step_of_a_layer() -> dict:
    """A step of plain torch: forward, backward, clipping, AdamW."""
    layer = nn.Linear(4, 3)
    with card() as watch:
        layer = on_card(layer)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        with watch.counting() as waits:
            x = torch.randn(5, 4).pin_memory().to(CARD, non_blocking=True)
            layer(x).square().sum().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        devices = {str(p.device) for p in layer.parameters()}
        devices |= {str(p.grad.device) for p in layer.parameters()}
    return {"waits": waits, "devices": sorted(devices)}


def attention() -> dict:
    with card() as watch, watch.counting() as waits:
        q = torch.randn(1, 2, 8, 16, device=CARD, dtype=torch.bfloat16, requires_grad=True)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        y.float().square().sum().backward()
        return {"waits": waits, "dtype": str(q.grad.dtype), "shape": list(q.grad.shape)}


def ties() -> dict:
    """Whether one parameter in two modules is one on the card too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with card():
        copied = on_card(model)
        return {"tied": copied[0].weight is copied[1].weight, "own": model[0].weight.is_cpu}


def numbers_of_the_host() -> dict:
    """Whether code on the host has true numbers meanwhile."""
    with card() as watch, watch.counting() as waits:
        padded = torch.tensor([3, -1, 5])
        places = (padded >= 0).nonzero().squeeze(1).tolist()
        return {"waits": waits, "places": places}


def another_device() -> dict:
    """What is raised where tensors of two devices meet."""
    with card():
        x = torch.ones(3, device=CARD)
        try:
            x + copy.copy(torch.ones(3))
        except Exception as error:
            return {"raised": str(error).splitlines()[0]}
    return {"raised": ""}


def _waits(operation: Callable[[torch.Tensor], object]) -> Callable[[], list[str]]:
    def case() -> list[str]:
        with card() as watch:
            x = torch.ones(4, 3, device=CARD)
            with watch.counting() as waits, suppress(DynamicOutputShapeException):
                operation(x)
        return waits

    return case


# Operations that wait for the card, and others like them that do not.
WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if torch.isfinite(x).all() else 0,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x[:, 0] > 0],
    "write by a mask": lambda x: x.__setitem__(x[:, 0] > 0, torch.ones(4, 3, device=CARD)),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to(CARD),
    "from the host, not pinned": lambda x: torch.ones(3).to(CARD, non_blocking=True),
    "from the host, pinned": lambda x: torch.ones(3).pin_memory().to(CARD),
    "a new tensor of numbers": lambda x: torch.tensor([1, 2], device=CARD),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "repeats": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=CARD), 0),
    "inverse": lambda x: torch.linalg.inv(x[:3]),
}
QUIET: dict[str, Callable[[torch.Tensor], object]] = {
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device=CARD)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "fill by a mask": lambda x: x.masked_fill_(x > 0, 2.0),
    "write one number by a mask": lambda x: x.__setitem__(x > 0, 2.0),
    "number of the host": lambda x: x * torch.tensor(2.0),
    "to the host, later": lambda x: x.to("cpu", non_blocking=True),
    "to pinned memory": lambda x: torch.empty(4, 3, pin_memory=True).copy_(x, non_blocking=True),
    "from the host": lambda x: torch.ones(3).pin_memory().to(CARD, non_blocking=True),
    "event": lambda x: _event().synchronize(),
    "arange": lambda x: torch.arange(5, device=CARD),
}


def stream_of_an_event() -> list[str]:
    """Whose stream what is on its way to the host is waited for in."""
    devices: list[str] = []
    with (
        card(),
        patch.object(torch.accelerator, "current_stream", lambda d: devices.append(str(d))),
    ):
        OnTheWay(torch.ones(3, device=CARD), torch.ones(4, device=CARD)).arrived()
    return devices


def _event() -> torch.Event:
    event = torch.Event(CARD)
    event.record()
    return event


CASES = {
    "step": step_of_a_layer,
    "attention": attention,
    "ties": ties,
    "host": numbers_of_the_host,
    "another device": another_device,
    "stream": stream_of_an_event,
    **{f"waiting: {name}": _waits(operation) for name, operation in WAITING.items()},
    **{f"quiet: {name}": _waits(operation) for name, operation in QUIET.items()},
}
