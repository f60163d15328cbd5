"""The head on labelled rows alone: what a model does behind it is found, proven, and computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, MiniCPM3Config

import veneer
from support import tiny_models
from support.changed_logits import changed
from support.closeness import assert_gradients_no_further, assert_no_further
from support.plain import own_loss
from support.random_adapters import examples, shake, tokenizer, with_new_tokens
from support.tiny_models import ALL_HEADS, SHAPE, quantized, tiny
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.head import Head, own_logits_and_head
from veneer.kernels import cross_entropy
from veneer.kernels.cross_entropy import Logits
from veneer.quant.weight import QuantizedLinear

ROWS = examples([17, 5, 30, 12], learnt=0.4)
TOKENS = torch.tensor([ROWS[0].tokens])
BEHIND = {
    "nothing": Logits(),
    "a scale": Logits(0.3),
    "a cap": Logits(softcap=2.0),
    "both": Logits(1.7, 2.0),
}


def with_bias() -> Any:
    return veneer.attach(tiny("phi"), veneer.LoRA(rank=2))


def with_adapted_head() -> Any:
    return veneer.attach(tiny("qwen2"), veneer.LoRA(rank=2, targets=["all", "lm_head"]))


def with_adapted_bias() -> Any:
    return veneer.attach(tiny("phi"), veneer.LoRA(rank=2, targets=["all", "lm_head"]))


def with_trained_head() -> Any:
    return veneer.attach(tiny("qwen2"), veneer.Method("freeze", trained_blocks=1, train_head=True))


def with_trained_tokens() -> Any:
    model = tiny("llama")
    with_new_tokens(model, tokenizer(80))
    return veneer.attach(model, veneer.LoRA(rank=2))


def with_quantized_head() -> Any:
    model = quantized("qwen2", head=True)
    return veneer.attach(model, veneer.LoRA(rank=2, targets=["all", "lm_head"]))


MODELS = (
    with_bias,
    with_adapted_head,
    with_adapted_bias,
    with_trained_head,
    with_trained_tokens,
    with_quantized_head,
)


def wide(model: Any) -> Any:
    """Return the model itself in float64, with no quantized weight left."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight.data = module.weight.detach()
            if module.bias is not None:
                dense.bias.data = module.bias.detach()
            model.set_submodule(name, dense.requires_grad_(False))
    return model.double()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    values = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, values, strict=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.thinned
def test_loss_and_gradients_are_the_models_own(kind, behind, packed, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * tiny_models.VOCAB)
    model = changed(shake(kind()), lambda logits, hidden: BEHIND[behind](logits))
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.packed, notices) == (True, [])
    assert_same(chosen.head, BEHIND[behind])
    chosen = chosen if packed else Forward(False, chosen.head)
    loss, peer = chosen(model, pack(ROWS, range(len(ROWS)))), own_loss(model, ROWS)
    ours, peers = gradients(model, loss), gradients(model, peer)
    exact = own_loss(wide(model), ROWS)
    assert_no_further(loss, peer, exact, "the loss")
    assert_gradients_no_further(ours, peers, gradients(model, exact))


def assert_same(head: Head | None, logits: Logits) -> None:
    """Assert that a head was found, and measured to 1e-6 at least."""
    assert head is not None
    assert head.logits.scale == pytest.approx(logits.scale, rel=1e-6)
    assert (head.logits.softcap is None) == (logits.softcap is None)
    assert (head.logits.softcap or 0.0) == pytest.approx(logits.softcap or 0.0, rel=1e-6)
    assert head.dtype is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("architecture", "behind"),
    [
        ("phi", Logits()),
        ("gemma2", Logits(softcap=3.0)),
        ("granite", Logits(scale=1 / 4)),
        ("falcon_h1", Logits(scale=0.5)),
        ("cohere", Logits(scale=0.3)),
    ],
)
def test_what_a_configuration_says_is_taken_exactly(architecture, behind, dtype, monkeypatch):
    cohere = CohereConfig(**SHAPE, logit_scale=0.3)
    monkeypatch.setitem(tiny_models.OTHER_DECODERS, "cohere", cohere)
    with torch.no_grad():
        model = tiny(architecture, dtype=dtype)
        own, head, why_not = own_logits_and_head(model, TOKENS)
        assert (head, why_not) == (Head(behind), None)
        assert torch.equal(own, model(TOKENS).logits[0])


def test_a_cap_far_above_all_logits_is_found():
    model = changed(tiny("llama"), lambda logits, hidden: Logits(softcap=1000.0)(logits))
    with torch.no_grad():
        _, head, _ = own_logits_and_head(model, TOKENS)
    assert_same(head, Logits(softcap=1000.0))


def test_a_head_that_reads_another_dtype():
    with torch.no_grad():
        _, head, _ = own_logits_and_head(tiny("mamba", dtype=torch.bfloat16), TOKENS)
    assert head == Head(dtype=torch.bfloat16)


def test_a_head_that_reads_scaled_states(monkeypatch):
    config = MiniCPM3Config(
        **ALL_HEADS, dim_model_base=12, q_lora_rank=8, kv_lora_rank=8, v_head_dim=8
    )
    monkeypatch.setitem(tiny_models.OTHER_DECODERS, "minicpm3", config)
    with torch.no_grad():
        _, head, _ = own_logits_and_head(tiny("minicpm3"), TOKENS)
    assert_same(head, Logits(12 / 32))


FALSE = {
    "a bias of each token and text": lambda logits, hidden: (
        logits + 0.1 * hidden[..., :1] * torch.linspace(-1, 1, logits.shape[-1])
    ),
    "a bias of each row": lambda logits, hidden: logits + 0.1 * hidden[..., :1],
    "a bias of each token": lambda logits, hidden: logits + torch.linspace(0, 1, logits.shape[-1]),
    "a hard cap": lambda logits, hidden: logits.clamp(-2, 2),
    "another cap": lambda logits, hidden: 2 * torch.erf(logits / 2),
    "a negative scale": lambda logits, hidden: -logits,
    "a norm": lambda logits, hidden: logits / logits.norm(dim=-1, keepdim=True),
    "no token but some": lambda logits, hidden: logits.index_fill(-1, torch.arange(5), -100.0),
}


@pytest.mark.parametrize("false", FALSE)
def test_a_head_that_does_something_else_is_refused(false):
    model = changed(shake(with_adapted_head()), FALSE[false])
    chosen, notices = choose_forward(model, ROWS)
    assert chosen.head is None
    assert len(notices) == 1
    assert "Logits are made for all rows" in notices[0]
    assert "more than multiply, scale and cap" in notices[0]
    loss, peer = chosen(model, pack(ROWS, range(len(ROWS)))), own_loss(model, ROWS)
    assert_no_further(loss, peer, own_loss(model.double(), ROWS), "the loss")
