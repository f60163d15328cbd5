"""Layers that give the same numbers on a few tokens, and would not on others: not computed as two
functions."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import veneer
from support.every_architecture import small, small_config, small_quantized
from support.random_adapters import examples, shake
from support.tiny_models import tiny
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.head import Head
from veneer.fused.layers import FusedLayer
from veneer.fused.recognise import recognise
from veneer.fused.structure import Variant
from veneer.kernels import choice

ROWS = examples([14, 9, 20], seed=3)
HOOKS = {
    "forward": lambda module, note: module.register_forward_hook(note),
    "forward before": lambda module, note: module.register_forward_pre_hook(note),
    "backward": lambda module, note: module.register_full_backward_hook(note),
    "backward before": lambda module, note: module.register_full_backward_pre_hook(note),
}


def adapted(model: nn.Module | None = None, targets="all") -> nn.Module:
    return shake(
        veneer.attach(model or tiny("llama"), veneer.LoRA(rank=2, targets=targets))
    ).train()


def step(forward: Forward, model: nn.Module) -> list[Tensor]:
    """Return the loss of all rows and its gradients."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    loss = forward(model, pack(ROWS, range(3)))
    return [loss, *torch.autograd.grad(loss, trained)]


def layer_that_passes_on(scale: float) -> Callable[..., Tensor]:
    """Return the forward of a layer that passes a number on to its mixture."""

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        x = hidden_states + self.self_attn(hidden_states=normed, **options)[0]
        return x + self.mlp(self.post_attention_layernorm(x), scale)

    return forward


def why_not(model: nn.Module) -> str:
    """Return why the second layer is not computed as two functions."""
    return choose_forward(model, ROWS)[0].unfused.get("model.layers.1", "it is")


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn", "mlp.act_fn", "input_layernorm"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.thinned
def test_hooks_of_others_are_called(kind, path):
    model, calls = adapted(), []
    chosen, _ = choose_forward(model, ROWS)
    module = model.model.layers[1].get_submodule(path)
    hook = HOOKS[kind](module, lambda *_: calls.append(path))
    step(chosen, model)
    assert calls == [path]
    assert "hooks" in why_not(model)
    hook.remove()
    assert why_not(model) == "it is"


def test_hooks_within_a_mixture_are_called_beside_fused_attention():
    model, calls = adapted(small("qwen3_moe")), []
    chosen, _ = choose_forward(model, ROWS)
    assert [layer.structure.mixture for layer in chosen.layers] == ["mlp", "mlp"]
    expected = step(chosen, model)
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append("gate"))
    assert all(layer.is_as_proven() for layer in chosen.layers)
    assert all(map(torch.equal, step(chosen, model), expected))
    assert calls == ["gate"]
    # transformers' own hooks for the loss of routers are on attention too: layers are left alone.
    ids = torch.tensor([ROWS[0].tokens])
    assert model(input_ids=ids, labels=ids, output_router_logits=True).aux_loss > 0
    assert not any(layer.is_as_proven() for layer in chosen.layers)


def test_a_mixture_that_needs_more_than_it_reads_is_left_alone(monkeypatch):
    model = adapted(small("qwen3_moe"))
    block = type(model.model.layers[1].mlp)
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, scale=1.0: own(self, x) * scale)
    layer = type(model.model.layers[1])
    monkeypatch.setattr(layer, "forward", layer_that_passes_on(scale=0.5))
    assert "numbers are others" in why_not(model)


@pytest.mark.parametrize("path", ["mlp.up_proj", "mlp.act_fn", "input_layernorm"])
def test_forwards_of_others_are_called(path):
    model, calls = adapted(targets=["q_proj"]), []
    chosen, _ = choose_forward(model, ROWS)
    module = model.model.layers[0].get_submodule(path)
    own = module.forward
    module.forward = lambda x: calls.append(path) or own(x)
    step(chosen, model)
    assert calls == [path]


def test_a_module_that_is_replaced_is_not_the_one_that_was_proven():
    model = adapted()
    chosen, _ = choose_forward(model, ROWS)
    layer = model.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp, nn.Tanh())
    for ours, expected in zip(
        step(chosen, model), step(replace(chosen, layers=()), model), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it():
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.1 if self.training else 1.0)

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Noisy
    model = adapted(model, ["q_proj"])
    chosen, _ = choose_forward(model, ROWS)
    assert [fused.layer for fused in chosen.layers] == [model.model.layers[1]]
    for ours, expected in zip(
        step(chosen, model), step(replace(chosen, layers=()), model), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_a_layer_that_returns_more_keeps_its_own_forward(monkeypatch):
    model, tokens = adapted(tiny("falcon")).eval(), torch.tensor([ROWS[0].tokens])
    assert all(isinstance(it, FusedLayer) for it in recognise(model, tokens).values())
    kind = type(model.transformer.h[0])
    own = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, x, **options: (own(self, x, **options)[0], x.sum())
    )
    assert not any(isinstance(it, FusedLayer) for it in recognise(model, tokens).values())


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.thinned
def test_a_bases_own_checkpointing_is_ours_in_a_pass(reentrant, layers):
    """It would compute layers again when packed rows are no longer known."""
    model = adapted()
    chosen, _ = choose_forward(model, ROWS)
    chosen = replace(chosen, layers=chosen.layers[:layers])
    expected = step(chosen, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            ours = step(chosen, model)
        for own, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(own, other)
        assert model.is_gradient_checkpointing
        assert model.model.layers[0].gradient_checkpointing
    with chosen.installed(model):
        assert model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_a_window_that_attention_is_not_told_of(kind, monkeypatch):
    """On rows shorter than it, nothing shows."""
    model = adapted()
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.packed, notices) == (True, [])
    model.config.layer_types = ["full_attention", kind]
    model.config.sliding_window = model.config.attention_chunk_size = 30
    chosen, notices = choose_forward(model, ROWS)
    assert not chosen.packed
    assert "window" in notices[0]
    model.config.layer_types = None
    assert choose_forward(model, ROWS)[0].packed
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "create_sliding_window_causal_mask", None, raising=False)
    assert not choose_forward(model, ROWS)[0].packed
    model.config.sliding_window = model.config.max_position_embeddings
    assert choose_forward(model, ROWS)[0].packed


@pytest.mark.parametrize("architecture", ["cohere2", "glm4", "gpt_neox"])
def test_variants_are_told_apart_where_a_layer_adds_little(architecture):
    """Beside a large residual in 16 bits, what attention adds hardly shows."""
    torch.manual_seed(0)
    config = small_config(architecture)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1000)
    tokens = examples([12], vocabulary=config.vocab_size)[0].tokens
    model.requires_grad_(False).eval()
    of_few_bits = variants(model, torch.tensor([tokens]))
    assert all(isinstance(it, Variant) for it in of_few_bits)
    assert variants(model.double(), torch.tensor([tokens])) == of_few_bits


def variants(model: nn.Module, tokens: Tensor) -> set:
    return {
        it.variant if isinstance(it, FusedLayer) else it for it in recognise(model, tokens).values()
    }


def test_heads_whose_dims_lie_in_another_order_are_left_alone(monkeypatch):
    """Scores are the same, but not with the keys of a prefix, which lie as the model's own do."""
    model = adapted()
    code = sys.modules[type(model).__module__]
    own = code.apply_rotary_pos_emb

    def turned_with_pairs_apart(q: Tensor, k: Tensor, *angles: Any, **options: Any) -> Any:
        q, k = (x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in (q, k))
        return own(q, k, *angles, **options)

    monkeypatch.setattr(code, "apply_rotary_pos_emb", turned_with_pairs_apart)
    assert why_not(model) == "its numbers are others than those of the two functions"


def test_a_layer_that_clips_what_few_tokens_have():
    """OLMo's later models clip queries, keys and values at 8."""
    config = small_config("olmo")
    tokens = torch.tensor([examples([12], vocabulary=config.vocab_size)[0].tokens])
    for clip, reasons in ((None, set()), (50.0, {"it clips numbers that are large"})):
        config.clip_qkv = clip
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
        assert {it for it in recognise(model, tokens).values() if isinstance(it, str)} == reasons


@pytest.mark.parametrize("option", ["s_aux", "softcap"])
def test_sinks_and_soft_caps_reach_the_two_functions(option):
    model = adapted()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.sinks = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 3.0]), requires_grad=False)
        own = type(attention).forward
        options = {"s_aux": attention.sinks} if option == "s_aux" else {"softcap": 0.5}
        attention.__class__ = type(
            "Asked",
            (type(attention),),
            {
                "forward": lambda self, *args, own=own, options=options, **kw: own(
                    self, *args, **kw, **options
                )
            },
        )
    model.eval()
    plain = step(choose_forward(adapted(), ROWS)[0], adapted())[0]
    layers = tuple(recognise(model, torch.tensor([ROWS[1].tokens])).values())
    assert all(isinstance(layer, FusedLayer) for layer in layers), layers
    fused = Forward(True, Head(), layers)
    assert not torch.allclose(step(fused, model)[0], plain, rtol=1e-3)
    for ours, expected in zip(
        step(fused, model), step(replace(fused, layers=()), model), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_that_wait_for_a_card_are_announced(quantized, monkeypatch):
    model = (
        small_quantized("qwen3_moe", 4, dtype=torch.float32) if quantized else small("qwen3_moe")
    )
    why = choice.slower_experts_on
    hopper = choice.Device("cuda", (9, 0))

    def on_a_card(_device: choice.Device, _dtype: torch.dtype, *, quantized: bool) -> str:
        return why(hopper, torch.bfloat16, quantized=quantized)

    monkeypatch.setattr(choice, "slower_experts_on", on_a_card)
    _, notices = choose_forward(adapted(model, targets="attention"), ROWS)
    assert any("waits for the card" in notice for notice in notices) is quantized
