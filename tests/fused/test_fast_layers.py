"""Which layers are computed as two functions, and what happens to all others."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoConfig

import veneer
from support.random_adapters import examples, shake
from support.tiny_models import CONFIGS, tiny
from veneer.data.packing import pack
from veneer.fused import layers as fast_layers
from veneer.fused.forward import choose_forward
from veneer.kernels import native

ROWS = examples([14, 9, 20], seed=3)


def adapted(architecture: str = "llama", **options):
    return shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets="all", **options)))


def counted(monkeypatch) -> list[nn.Module]:
    """Return the layers that really are computed as two functions, as they come to be."""
    seen: list[nn.Module] = []
    plain = fast_layers.FusedLayer.forward

    def forward(self, *args, **options):
        found = plain(self, *args, **options)
        if found is not None:
            seen.append(self.layer)
        return found

    monkeypatch.setattr(fast_layers.FusedLayer, "forward", forward)
    return seen


def test_all_layers_and_only_while_the_loss_is_made(monkeypatch):
    model = adapted().train()
    chosen, notices = choose_forward(model, ROWS)
    assert notices == []
    assert [found.layer for found in chosen.layers] == list(model.model.layers)
    seen = counted(monkeypatch)
    chosen(model, pack(ROWS, [0, 1]))
    assert seen == list(model.model.layers)
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_dropped_inputs_go_the_general_way(monkeypatch):
    model = adapted(dropout=0.5).train()
    chosen, _ = choose_forward(model, ROWS)
    seen = counted(monkeypatch)
    chosen(model, pack(ROWS, [0])).backward()
    assert seen == []
    model.eval()
    chosen(model, pack(ROWS, [0])).backward()
    assert len(seen) == 2


def test_a_trained_norm_goes_the_general_way():
    model = adapted().train()
    norm = model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    chosen, _ = choose_forward(model, ROWS)
    assert [found.layer for found in chosen.layers] == [model.model.layers[0]]
    chosen(model, pack(ROWS, [0, 1])).backward()
    assert norm.grad.norm() > 0


@pytest.mark.parametrize("what", ["multiplier", "activation", "norm", "extra part"])
def test_a_layer_that_means_something_else_is_left_alone(what, monkeypatch):
    model = adapted()
    layer = model.model.layers[0]
    if what == "multiplier":
        own = type(layer).forward

        def forward(self, hidden_states, **options):
            return hidden_states + 0.9 * (own(self, hidden_states, **options) - hidden_states)

        monkeypatch.setattr(type(layer), "forward", forward)
        expected = 0
    else:
        expected = 1
    if what == "activation":
        layer.mlp.act_fn = nn.GELU()
    elif what == "norm":
        layer.input_layernorm.variance_epsilon = None
        layer.input_layernorm.eps = 1e-6
        layer.input_layernorm.forward = lambda x: 1.05 * nn.functional.rms_norm(x, x.shape[-1:])
    elif what == "extra part":
        layer.self_attn.q_norm = nn.Identity()
    model.eval()
    with torch.no_grad():
        wanted = sum(
            nn.functional.cross_entropy(
                model(torch.tensor([row.tokens])).logits[0, :-1],
                torch.tensor(row.labels[1:]),
                ignore_index=-100,
                reduction="sum",
            )
            for row in ROWS
        )
    chosen, _ = choose_forward(model, ROWS)
    assert len(chosen.layers) == expected
    torch.testing.assert_close(chosen(model, pack(ROWS, range(3))).detach(), wanted)


def test_names_alone_do_not_make_a_layer():
    """OLMo's layers have LLaMA's names, and norms without a weight."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        OlmoConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.packed, chosen.layers, notices) == (True, (), [])
    chosen(model, pack(ROWS, range(3))).backward()


def test_selective_with_dropped_inputs_is_whole_and_said():
    model = adapted(dropout=0.5).train()
    chosen, notices = choose_forward(model, ROWS, recompute="selective")
    assert chosen.recompute == "full"
    assert len(notices) == 1


def test_a_context_shorter_than_the_filling():
    config = copy.deepcopy(CONFIGS["minigpt"])
    config.context = 24
    model = veneer.attach(AutoModelForCausalLM.from_config(config), veneer.LoRA(rank=2))
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.packed, notices) == (True, [])
    assert sum(len(row.tokens) for row in ROWS) % 64 != 0
    chosen(model, pack(ROWS, range(3))).backward()


def test_no_model_is_kept_by_having_been_looked_at():
    model = adapted()
    choose_forward(model, ROWS)
    layer = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert layer() is None


def test_without_a_compiler_the_same_and_said(monkeypatch):
    model = adapted().train()
    chosen, _ = choose_forward(model, ROWS)
    wanted = chosen(model, pack(ROWS, range(3)))
    native._kernel.cache_clear()
    monkeypatch.setattr(native, "load", lambda: (None, "no C++ compiler was found"))
    try:
        slower, notices = choose_forward(model, ROWS)
        assert [notice for notice in notices if "no C++ compiler" in notice] == notices != []
        assert slower.layers
        torch.testing.assert_close(slower(model, pack(ROWS, range(3))), wanted)
    finally:
        native._kernel.cache_clear()


def test_selective_where_no_layer_is_known():
    model = shake(veneer.attach(tiny("gpt2"), veneer.LoRA(rank=2)))
    chosen, notices = choose_forward(model, ROWS, recompute="selective")
    assert chosen.recompute == "full"
    assert len(notices) == 1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_less_is_kept(recompute):
    kept = {}
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers, config.intermediate_size = 8, 256
    torch.manual_seed(0)
    for how in ("none", recompute):
        model = veneer.attach(type(tiny("llama"))(config), veneer.LoRA(rank=2, targets="all"))
        chosen, _ = choose_forward(model.train(), ROWS, recompute=how)
        sizes: dict[int, int] = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            chosen(model, pack(ROWS, range(3)))
        kept[how] = sum(sizes.values())
    limit = {"none": 1.0, "selective": 0.5, "full": 0.3}[recompute]
    assert kept[recompute] <= limit * kept["none"]
