"""Every part of PEFT's LoRA, both ways: its logits, and its gradients after one step."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import veneer
from adapted import distance, same, snapshot
from peft_cases import CASES, base, logits, loss, opened, parts_of, theirs, train_parts, written

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LR = 0.1
# What PEFT trains as one, and we, who keep it as two, must step by the sum of both gradients.
AS_ONE: dict[str, dict[str, str]] = {
    "embedding and head as one": {
        "model.embed_tokens.lora_embedding_A": "lm_head.lora_B",
        "model.embed_tokens.lora_embedding_B": "lm_head.lora_A",
    },
    "saved as one": {"model.embed_tokens.weight": "lm_head.weight"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_both_ways(case, tmp_path):
    kind, options = CASES[case]
    their_model = theirs(kind, options)
    written(their_model, tmp_path / "peft")
    wanted = logits(their_model, kind)
    model = base(kind)
    own = logits(model, kind)
    before = snapshot(model)
    veneer.load(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model, kind), wanted, **CLOSE)
    assert distance(wanted, own) > 0.01

    veneer.save(model, tmp_path / "back", format="peft")
    torch.testing.assert_close(logits(opened(kind, tmp_path / "back"), kind), wanted, **CLOSE)
    veneer.save(model, tmp_path / "native")
    for place in ("back", "native"):
        again = veneer.load(base(kind), tmp_path / place)
        assert same(parts_of(again), parts_of(model))
        torch.testing.assert_close(logits(again, kind), logits(model, kind), **CLOSE)

    veneer.use(model, None)
    assert torch.equal(logits(model, kind), own)
    veneer.use(model, "default")
    torch.testing.assert_close(logits(model, kind), wanted, **CLOSE)
    veneer.detach(model)
    assert torch.equal(logits(model, kind), own)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("case", CASES)
def test_gradients_after_one_step(case, tmp_path):
    kind, options = CASES[case]
    their_model = theirs(kind, options)
    written(their_model, tmp_path / "start")
    model = veneer.load(base(kind), tmp_path / "start")
    before = {name: weight.detach().clone() for name, weight in parts_of(model).items()}
    train_parts(model)
    for one in (their_model, model):
        trained = [weight for weight in one.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=LR)
        loss(one, kind).backward()
        optimizer.step()
    written(their_model, tmp_path / "stepped")
    wanted = gradients(veneer.load(base(kind), tmp_path / "stepped"), before)
    ours = gradients(model, before)
    for first, second in AS_ONE.get(case, {}).items():
        total = ours[first] + turned(ours[second], ours[first])
        ours |= {first: total, second: turned(total, ours[second])}
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, **CLOSE, msg=f"{name}: {{}}".format)
        assert gradient.any(), name
    if case not in AS_ONE:
        torch.testing.assert_close(logits(model, kind), logits(their_model, kind), **CLOSE)


def gradients(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the step that each part has made, as a gradient."""
    return {n: (before[n] - part.detach()) / LR for n, part in parts_of(model).items()}


def turned(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.shape == like.shape else tensor.T
