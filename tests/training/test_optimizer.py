"""AdamW over one buffer is torch's AdamW over the weights."""

import pytest
import torch
from torch import nn

from support.closeness import assert_no_further
from veneer.training.optimizer import FlatAdamW


def weights(*dtypes: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (), (2, 2, 2)]
    return {
        f"{i}": nn.Parameter(torch.randn(shape).to(dtypes[i % len(dtypes)]))
        for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64, torch.float32)])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("ratios", [{}, {"1": 16.0, "3": 0.25}])
def test_equals_torch(ratios, clip, dtypes):
    ours, theirs, reference = weights(*dtypes), weights(*dtypes), weights(*dtypes)
    reference = {name: nn.Parameter(weight.detach().double()) for name, weight in reference.items()}
    flat = FlatAdamW(ours, lr=1.0, weight_decay=0.1, ratios=ratios)
    adamws = []
    for peers in (theirs, reference):
        groups = [{"params": [w], "lr": 0.01 * ratios.get(n, 1.0)} for n, w in peers.items()]
        adamws.append(torch.optim.AdamW(groups, weight_decay=0.1, fused=True))
    for step in range(4):
        flat.begin()
        for name, weight in ours.items():
            gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            (weight * gradient.to(weight.dtype)).sum().backward()
            for peers in (theirs, reference):
                peers[name].grad = gradient.to(peers[name].dtype)
        for peers, adamw in zip((theirs, reference), adamws, strict=True):
            if clip:
                nn.utils.clip_grad_norm_(peers.values(), clip)
            adamw.step()
        assert flat.step(lr=0.01, clip=clip)
        for name, weight in ours.items():
            assert_no_further(*(w.detach() for w in (weight, theirs[name], reference[name])), name)
            assert weight.grad is None


def test_gradients_add_up_and_are_forgotten():
    ours = weights(torch.float32)
    flat = FlatAdamW(ours, lr=0.1, weight_decay=0.0)
    flat.begin()
    for _ in range(2):
        sum(weight.sum() for weight in ours.values()).backward()
    assert all((weight.grad == 2).all() for weight in ours.values())
    flat.forget()
    assert all(weight.grad is None for weight in ours.values())
    flat.begin()
    assert not any(weight.grad.any() for weight in ours.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing(bad):
    ours = weights(torch.float32)
    before = {name: weight.detach().clone() for name, weight in ours.items()}
    flat = FlatAdamW(ours, lr=0.1, weight_decay=0.1)
    flat.begin()
    (ours["0"] * bad).sum().backward()
    assert not flat.step(lr=0.1, clip=1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in ours.items())
    assert all(weight.grad is None for weight in ours.values())
    assert not any(value.any() for value in flat.state().values())


def test_goes_on_from_its_state_to_the_bit():
    def course(flat: FlatAdamW, ours: dict[str, nn.Parameter], steps: range) -> None:
        for step in steps:
            flat.begin()
            sum((weight**2).sum() * (step + 1) for weight in ours.values()).backward()
            flat.step(lr=0.1, clip=1.0)

    whole = weights(torch.float32)
    course(FlatAdamW(whole, lr=0.1, weight_decay=0.1), whole, range(5))
    first = weights(torch.float32)
    flat = FlatAdamW(first, lr=0.1, weight_decay=0.1)
    course(flat, first, range(2))
    state = flat.state()
    flat.release()
    second = {name: nn.Parameter(weight.detach().clone()) for name, weight in first.items()}
    other = FlatAdamW(second, lr=0.1, weight_decay=0.1)
    other.load(state)
    course(other, second, range(2, 5))
    assert all(torch.equal(weight, whole[name]) for name, weight in second.items())


def test_released_weights_own_their_memory():
    ours = weights(torch.float32)
    flat = FlatAdamW(ours, lr=0.1, weight_decay=0.0)
    shared = {weight.untyped_storage().data_ptr() for weight in ours.values()}
    assert len(shared) == 1
    flat.release()
    assert len({weight.untyped_storage().data_ptr() for weight in ours.values()}) == len(ours)
    assert all(weight.grad is None for weight in ours.values())
