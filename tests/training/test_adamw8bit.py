"""Moments in 8 bits are bitsandbytes' own, to the bit, and go on from a checkpoint."""

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from veneer import LoRA, Method
from veneer.errors import ConfigError
from veneer.plan.config import PlanConfig
from veneer.plan.find import sizes_of
from veneer.plan.memory import LEAST, MOMENT
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan
from veneer.training import adamw8bit
from veneer.training.adamw8bit import BLOCK, check_optimizer
from veneer.training.optimizer import FlatAdamW

SHAPES = {"matrix": (64, 96), "odd": (71, 83), "small": (9,)}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def flat_of(ours: dict[str, nn.Parameter]) -> FlatAdamW:
    return FlatAdamW(ours, lr=0.1, weight_decay=0.1, ratios={"odd": 4.0}, optimizer="adamw8bit")


def course(flat: FlatAdamW, ours: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        flat.begin()
        generator = torch.Generator().manual_seed(step)
        for weight in ours.values():
            weight.grad += torch.randn(weight.shape, generator=generator).to(weight.dtype)
        assert flat.step(lr=0.01, clip=0.0)


def test_equals_bitsandbytes_to_the_bit():
    ours, theirs = weights(), weights()
    groups = [{"params": [w], "lr": 0.04 if n == "odd" else 0.01} for n, w in theirs.items()]
    peer = AdamW8bit(groups, weight_decay=0.1)
    course(flat_of(ours), ours, range(4))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for weight in theirs.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        peer.step()
    for name in ("matrix", "odd"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["small"], theirs["small"])  # in 32 bits, by torch


@pytest.mark.parametrize("host_decides", [True, False])  # on a card it does not
def test_a_gradient_that_is_not_finite_changes_nothing(host_decides, monkeypatch):
    monkeypatch.setattr(adamw8bit, "AT_ONCE", 4 * BLOCK)
    undisturbed, ours = weights(), weights()
    course(flat_of(undisturbed), undisturbed, range(4))
    flat = flat_of(ours)
    for buffer in flat._buffers:
        if buffer.moments is not None:
            buffer.moments._host_decides = host_decides
    course(flat, ours, range(2))
    for weight in (ours["matrix"], ours["small"]):
        before = flat.state()
        flat.begin()
        weight.grad[0] = torch.nan
        assert not flat.step(lr=0.01, clip=1.0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in flat.state().items())
    course(flat, ours, range(2, 4))
    for name, weight in ours.items():
        assert torch.equal(weight, undisturbed[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_on_from_its_state_to_the_bit(dtype):
    undisturbed = weights(dtype)
    course(flat_of(undisturbed), undisturbed, range(5))
    first = weights(dtype)
    flat = flat_of(first)
    course(flat, first, range(2))
    state = flat.state()
    flat.release()
    second = {name: nn.Parameter(weight.detach().clone()) for name, weight in first.items()}
    other = flat_of(second)
    other.load(state)
    course(other, second, range(2, 5))
    for name, weight in second.items():
        assert torch.equal(weight, undisturbed[name]), name


def test_moments_take_the_bytes_that_are_planned():
    ours = {"w": nn.Parameter(torch.zeros(8 * LEAST))}
    state = flat_of(ours).state()
    assert state["exp_avg/w"].dtype == torch.uint8
    assert len(state["exp_avg_scales/w"]) == 8 * LEAST // BLOCK
    moments = sum(tensor.nbytes for name, tensor in state.items() if name != "step")
    assert moments == 2 * MOMENT["adamw8bit"] * 8 * LEAST


WIDE = LlamaConfig(
    **{"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 1},
)


@pytest.mark.parametrize(
    ("method", "what", "settings"),
    [
        ("lora", LoRA(rank=16, targets="all"), {}),
        ("dora", LoRA(rank=16, targets="all", dora=True), {}),
        ("prefix", Method("prefix", virtual_tokens=8), {"virtual_tokens": 8}),
        (
            "prefix",
            Method("prefix", virtual_tokens=8, prefix_mlp=64),
            {"virtual_tokens": 8, "prefix_mlp": 64},
        ),
        ("full", Method("full"), {}),
        ("freeze", Method("freeze", trained_blocks=1), {"trained_blocks": 1}),
    ],
)
def test_moments_of_small_weights_are_planned_in_32_bits(method, what, settings):
    model = veneer.attach(AutoModelForCausalLM.from_config(WIDE).requires_grad_(False), what)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    state = FlatAdamW(trained, lr=0.1, weight_decay=0.1, optimizer="adamw8bit").state()
    moments = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("exp_avg"))
    config = PlanConfig(method=method, dtype="float32", optimizer="adamw8bit", **settings)
    sizes = sizes_of(WIDE)
    adapted = adapted_layers(sizes, what) if isinstance(what, LoRA) else ()
    planned = make_plan(config, sizes, adapted).memory.optimizer
    # A weight's last block has a scale, however short it is.
    assert planned.value <= moments < planned.value + 2 * 4 * len(trained)
    has_small = any(weight.numel() < LEAST for weight in trained.values())
    assert has_small == ("fewer than 4,096" in planned.formula)


@pytest.mark.parametrize(
    ("optimizer", "device", "instead"),
    [
        ("paged-adamw8bit", "cpu", "adamw or adamw8bit"),
        ("paged-adamw8bit", "xpu", "adamw or adamw8bit"),
        ("adamw8bit", "mps", "adamw"),
        ("paged-adamw8bit", "mps", "adamw"),
    ],
)
def test_what_does_not_run_is_refused_with_what_does(optimizer, device, instead):
    with pytest.raises(ConfigError, match=f"on {device}. Take {instead}\\."):
        check_optimizer(optimizer, torch.device(device))


def test_what_runs_is_not_refused():
    for device in ("cpu", "cuda", "mps", "xpu"):
        check_optimizer("adamw", torch.device(device))
    for device in ("cpu", "cuda", "xpu"):
        check_optimizer("adamw8bit", torch.device(device))
    check_optimizer("paged-adamw8bit", torch.device("cuda"))
    assert PlanConfig().optimizer == "adamw"
