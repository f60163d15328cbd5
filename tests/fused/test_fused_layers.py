"""Which layers are computed as two functions, and what happens to all others."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

import veneer
from support.random_adapters import examples, shake
from support.tiny_models import CONFIGS, tiny
from veneer.adapter.linear import LoRALinear
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.layers import FusedLayer
from veneer.kernels import native
from veneer.kernels.dropout import Mask

ROWS = examples([14, 9, 20], seed=3)


def adapted(architecture: str = "llama", **options):
    return shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets="all", **options)))


def counted(monkeypatch) -> list[nn.Module]:
    """Return a list that each layer joins when it is computed as two functions."""
    computed: list[nn.Module] = []
    plain = FusedLayer.forward

    def forward(self, *args, **options):
        y = plain(self, *args, **options)
        if y is not None:
            computed.append(self.layer)
        return y

    monkeypatch.setattr(FusedLayer, "forward", forward)
    return computed


def patches(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def test_all_layers_and_only_while_the_loss_is_made(monkeypatch):
    model = adapted().train()
    chosen, notices = choose_forward(model, ROWS)
    assert notices == []
    assert [fused.layer for fused in chosen.layers] == list(model.model.layers)
    computed = counted(monkeypatch)
    chosen(model, pack(ROWS, [0, 1]))
    assert computed == list(model.model.layers)
    assert patches(model) == []


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "disk"])
def test_one_installation_serves_many_passes(recompute, monkeypatch):
    model = adapted().train()
    chosen, _ = choose_forward(model, ROWS, recompute=recompute)
    batch, tokens = pack(ROWS, [0, 1]), torch.tensor([ROWS[0].tokens])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    expected = torch.autograd.grad(chosen(model, batch), trained)
    base = model(tokens).logits
    own = type(model.model.layers[0]).forward
    computed = counted(monkeypatch)

    def interrupted() -> None:
        with chosen.installed(model):
            for _ in range(2):
                with chosen.installed(model):  # as an evaluation within a run does
                    loss = chosen(model, batch)
                gradients = torch.autograd.grad(loss, trained)
                assert all(map(torch.equal, gradients, expected))
                assert patches(model) == list(model.model.layers)
                passes = len(computed)
                # Whoever calls the model between two passes has its own forward, and so has a copy.
                assert torch.equal(model(tokens).logits, base)
                plain = veneer.merge(model)
                assert [vars(layer)["forward"].__func__ for layer in patches(plain)] == [own, own]
                assert all(layer.forward.__self__ is layer for layer in patches(plain))
                assert len(computed) == passes
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert patches(model) == []
    assert model.config._attn_implementation == "sdpa"


def test_forwards_of_others_stay_under_and_over_ours(monkeypatch):
    model = adapted().train()
    chosen, _ = choose_forward(model, ROWS)
    under, over = model.model.layers
    calls: list[nn.Module] = []

    def noted(layer: nn.Module):
        forward = layer.forward

        def note(*args, **options):
            calls.append(layer)
            return forward(*args, **options)

        layer.forward = note
        return note

    below = noted(under)
    with chosen.installed(model):
        above = noted(over)
        chosen(model, pack(ROWS, [0]))
        assert calls == [over]
    assert (under.forward, over.forward) == (below, above)
    model(torch.tensor([ROWS[0].tokens]))
    assert calls == [over, under, over]


def test_a_layer_takes_its_own_forward_while_two_functions_do_not_apply(monkeypatch):
    model = adapted().train()
    norm = model.model.layers[1].input_layernorm.weight
    chosen, _ = choose_forward(model, ROWS)
    computed = counted(monkeypatch)
    with chosen.installed(model):
        for trains in (False, True, False):
            norm.requires_grad_(trains)
            chosen(model, pack(ROWS, [0])).backward()
        veneer.use(model, None)
        off = chosen(model, pack(ROWS, [0]))
    assert [list(model.model.layers).index(layer) for layer in computed] == [0, 1, 0, 0, 1, 0, 1]
    assert norm.grad.norm() > 0
    tokens, labels = torch.tensor([ROWS[0].tokens]), torch.tensor(ROWS[0].labels)
    own = nn.functional.cross_entropy(
        model(tokens).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(off, own)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_adapters_drop_inputs_as_they_do_in_layers_of_their_own_forward(recompute):
    model = adapted(dropout=0.5).train()
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    seeds = {
        mask.seed for _ in range(2) for layer in layers for _, mask in layer.projection().masks
    }
    assert len(seeds) == 2 * len(layers)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    chosen, notices = choose_forward(model, ROWS, recompute=recompute)
    assert (len(chosen.layers), chosen.recompute, notices) == (2, recompute, [])

    def step(forward: Forward) -> list[torch.Tensor]:
        torch.manual_seed(5)
        loss = forward(model, pack(ROWS, range(3)))
        return [loss, *torch.autograd.grad(loss, trained)]

    ours, again, own = step(chosen), step(chosen), step(replace(chosen, layers=()))
    assert all(map(torch.equal, ours, again))
    torch.testing.assert_close(ours, own)  # the same seeds in the same order
    other = chosen(model, pack(ROWS, range(3)))
    assert not torch.equal(other, ours[0])
    model.eval()
    assert torch.equal(chosen(model, pack(ROWS, [0])), chosen(model, pack(ROWS, [0])))


def test_where_nothing_drops_no_mask_is_made(monkeypatch):
    monkeypatch.setattr(Mask, "__init__", None)
    model = adapted("gpt2").train()
    chosen, _ = choose_forward(model, ROWS)
    chosen(model, pack(ROWS, range(3))).backward()
    assert len(chosen.layers) == 2


def gpt2(**dropout: float) -> nn.Module:
    config = copy.deepcopy(CONFIGS["gpt2"])
    for name, p in dropout.items():
        setattr(config, name, p)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all", dropout=0.2))).train()


def test_gpt2_drops_within_the_two_functions_as_it_is_published(monkeypatch):
    usual = GPT2Config()
    names = ("resid_pdrop", "attn_pdrop", "embd_pdrop")
    model = gpt2(**{name: getattr(usual, name) for name in names})
    generator = torch.get_rng_state()
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.unfused, notices) == ({}, [])
    assert torch.equal(torch.get_rng_state(), generator)
    for fused in chosen.layers:
        attention, feed_forward = fused.structure.attention, fused.structure.feed_forward
        assert (attention.dropout, attention.score_dropout, feed_forward.dropout) == (0.1,) * 3
    computed, batch = counted(monkeypatch), pack(ROWS, range(3))
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients(recompute: str) -> list[torch.Tensor]:
        torch.manual_seed(7)
        loss = replace(chosen, recompute=recompute)(model, batch)
        return [loss, *torch.autograd.grad(loss, trained)]

    first = gradients("none")
    assert computed == list(model.transformer.h)
    for recompute in ("none", "selective", "full"):
        assert all(map(torch.equal, gradients(recompute), first))
    losses = torch.stack([chosen(model, batch).detach() for _ in range(40)])
    assert losses.std() > 0
    model.eval()
    whole = chosen(model, batch).detach()
    assert torch.equal(chosen(model, batch), whole)
    assert (losses.mean() - whole).abs() < losses.std()


def test_the_base_s_dropout_is_where_its_own_code_has_it(monkeypatch):
    def drops_too_early(self, hidden_states):
        return self.c_proj(self.dropout(self.act(self.c_fc(hidden_states))))

    model = gpt2(resid_pdrop=0.1)
    assert choose_forward(model, ROWS)[0].layers
    monkeypatch.setattr(type(model.transformer.h[0].mlp), "forward", drops_too_early)
    chosen, _ = choose_forward(model, ROWS)
    assert (chosen.layers, chosen.packed) == ((), True)
    assert all("drops something else" in why for why in chosen.unfused.values())


def test_a_sum_that_is_dropped_is_found_by_its_numbers(monkeypatch):
    """Falcon adds both halves in place before its dropout."""
    model = adapted("falcon").train()
    chosen, _ = choose_forward(model, ROWS)
    assert len(chosen.layers) == 2
    for layer in model.transformer.h:
        layer.config.hidden_dropout = 0.1
    chosen, _ = choose_forward(model, ROWS)
    assert chosen.layers == ()


def test_a_trained_norm_goes_the_general_way():
    model = adapted().train()
    norm = model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    chosen, _ = choose_forward(model, ROWS)
    assert [fused.layer for fused in chosen.layers] == [model.model.layers[0]]
    chosen(model, pack(ROWS, [0, 1])).backward()
    assert norm.grad.norm() > 0


@pytest.mark.parametrize("what", ["multiplier", "activation", "norm", "a norm more"])
def test_a_layer_that_means_something_else_is_left_alone(what, monkeypatch):
    model = adapted()
    layer = model.model.layers[0]
    if what == "multiplier":
        own = type(layer).forward

        def forward(self, hidden_states, **options):
            return hidden_states + 0.9 * (own(self, hidden_states, **options) - hidden_states)

        monkeypatch.setattr(type(layer), "forward", forward)
        layers = 0
    else:
        layers = 1
    if what == "activation":
        layer.mlp.act_fn = nn.Softplus()
    elif what == "norm":
        layer.input_layernorm.variance_epsilon = None
        layer.input_layernorm.eps = 1e-6
        layer.input_layernorm.forward = lambda x: 1.05 * nn.functional.rms_norm(x, x.shape[-1:])
    elif what == "a norm more":
        layer.self_attn.v_proj = nn.Sequential(
            layer.self_attn.v_proj, nn.RMSNorm(layer.self_attn.v_proj.out_features)
        )
    model.eval()
    with torch.no_grad():
        expected = sum(
            nn.functional.cross_entropy(
                model(torch.tensor([row.tokens])).logits[0, :-1],
                torch.tensor(row.labels[1:]),
                ignore_index=-100,
                reduction="sum",
            )
            for row in ROWS
        )
    chosen, _ = choose_forward(model, ROWS)
    assert len(chosen.layers) == layers
    torch.testing.assert_close(chosen(model, pack(ROWS, range(3))).detach(), expected)


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


def test_without_a_compiler_the_same_with_a_notice(monkeypatch):
    model = adapted().train()
    chosen, _ = choose_forward(model, ROWS)
    expected = chosen(model, pack(ROWS, range(3)))
    native._kernel.cache_clear()
    monkeypatch.setattr(native, "load", lambda: (None, "no C++ compiler was found"))
    try:
        slower, notices = choose_forward(model, ROWS)
        assert [notice for notice in notices if "no C++ compiler" in notice] == notices != []
        assert slower.layers
        torch.testing.assert_close(slower(model, pack(ROWS, range(3))), expected)
    finally:
        native._kernel.cache_clear()


def test_native_parts_of_a_wheel_that_do_not_suit_are_compiled_with_a_notice(monkeypatch):
    monkeypatch.setattr(native, "why_compiled", lambda: "those of this wheel need avx2")
    _, notices = choose_forward(adapted(), ROWS)
    assert [notice for notice in notices if "on this machine" in notice and "avx2" in notice]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_on_the_disk_to_the_bit(architecture, tmp_path):
    model = adapted(architecture, dora=True).train()
    batch, made = pack(ROWS, range(3)), []
    for recompute in ("none", "disk"):
        chosen, notices = choose_forward(
            model, ROWS, recompute=recompute, directory=tmp_path / "not yet" / "there"
        )
        assert (chosen.recompute, notices) == (recompute, [])
        for _ in range(2):
            model.zero_grad()
            loss = chosen(model, batch)
            assert list(tmp_path.iterdir()) == []
            loss.backward()
            made.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("architecture", ["mamba", "gpt_oss"])
def test_on_the_disk_where_layers_are_not_fused(architecture):
    model = shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets="all")))
    chosen, notices = choose_forward(model, ROWS, recompute="disk")
    assert chosen.recompute == "full"
    assert any("Keeping activations on the disk does not suit" in notice for notice in notices)


def test_selective_where_no_layer_is_known():
    model = shake(veneer.attach(tiny("mamba"), veneer.LoRA(rank=2, targets="all")))
    chosen, notices = choose_forward(model, ROWS, recompute="selective")
    assert chosen.recompute == "full"
    assert any("computed whole again" in notice for notice in notices)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_less_is_kept(recompute):
    kept_bytes = {}
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
        kept_bytes[how] = sum(sizes.values())
    limit = {"none": 1.0, "selective": 0.5, "full": 0.3}[recompute]
    assert kept_bytes[recompute] <= limit * kept_bytes["none"]
