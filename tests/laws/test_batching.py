"""Law 7: how rows are laid out changes neither loss nor gradient: packed, padded, one by one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.every_architecture import small_config
from support.kinds import Kind, each_kind, in_share, is_first_of
from support.plain import own_loss, plain_pair
from support.random_adapters import examples, shake, targets_named
from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.active import active_adapters_of
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.fused import forward
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.head import Head
from veneer.kernels.cross_entropy import Logits
from veneer.training.events import Evaluated, Notice, Step

LENGTHS = [17, 5, 30, 5, 2]
ROWS = examples(LENGTHS)
STATES = ("falcon_h1", "mamba", "mamba2")  # which pass from row to row
NEVER_PACKED = NEVER_FUSED = STATES
HEADS = {  # of models that scale or cap their logits
    "falcon_h1": Head(Logits(scale=0.5)),
    "gemma2": Head(Logits(softcap=3.0)),
    "granite": Head(Logits(scale=1 / 4.0)),
    "minicpm3": Head(Logits(scale=1 / 2)),
}


def new_model(architecture: str, targets: str = "everything", **options: Any) -> Any:
    model = tiny(architecture)
    config = veneer.LoRA(rank=2, targets=targets_named(model, targets), **options)
    return shake(veneer.attach(model, config))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def taken(way: Forward) -> tuple[bool, bool]:
    return way.packed, way.head is not None


def accepted(
    model: Any, rows: list[Example], chosen: Forward, heads: set[Head | None]
) -> list[Forward]:
    """Return every way that may be taken of this model, by choose_forward's own measure."""
    ways = [Forward(False, head) for head in heads]
    ways += [Forward(True, head, chosen.layers) for head in heads]
    probes = [replace(row, labels=row.tokens) for row in rows[:3]]
    with torch.no_grad():
        own = float(own_loss(model, probes))
        return [way for way in ways if forward._why_not(way, model, probes, own) is None]


def is_of_the_head(kind: Kind, model: Any) -> bool:
    """Return whether an adapter changes what comes out of the decoder, and so each way of computing
    the loss from it."""
    head = model.get_output_embeddings()
    changed = kind.is_virtual or kind.new_tokens or kind.replaces_weights
    changed = changed or bool(active_adapters_of(model).modules_to_save)
    return changed or type(head) is not type(kind.base().get_output_embeddings())


def ways_of(kind: Kind, model: Any, rows: list[Example], *, every: bool) -> list[Forward]:
    """Return ways of computing the rows, having checked that they are those expected: every one, or
    the one that is chosen, with what it computes again, and that of the other layout."""
    # Which layers are computed again is decided last, and changes nothing else of the choice.
    sparse, notices = choose_forward(model, rows, recompute="selective")
    chosen = replace(sparse, recompute="none")
    assert sparse.recompute in ("selective", "full")
    unsuitable = any("Selective" in notice for notice in notices)
    assert unsuitable == (sparse.recompute == "full")
    packs = kind.architecture not in NEVER_PACKED
    if kind.architecture == "falcon":  # whose own code attends in a way of its own
        packs = bool(chosen.layers)
        assert packs == (kind.lora is not None)
    head = HEADS.get(kind.architecture, Head())
    assert (chosen.packed, chosen.head) == (packs, head)
    assert len(notices) == (not packs) + unsuitable
    if kind.lora or kind.is_virtual:  # a prefix is none of what the two functions know
        fused = kind.architecture not in NEVER_FUSED and not kind.name.startswith("prefix")
        assert bool(chosen.layers) == fused
    again = [replace(chosen, recompute=how) for how in {sparse.recompute, "full"}]
    if not every:
        return [*[Forward(False, head)] * packs, *again, chosen]
    ways = accepted(model, rows, chosen, {head, Head(), None})
    assert Forward(packs, head, chosen.layers) in ways
    assert {way.head for way in ways} == {head, None}
    # What passes between rows may hide within a loss, and Falcon's code masks it away.
    if kind.architecture not in (*STATES, "falcon"):
        assert any(way.packed for way in ways) == packs
    ways = [way for way in ways if packs or not way.packed]
    others = [way for way in ways if taken(way) != taken(chosen)]
    return [*others, *again, chosen]


# Which ways there are, and whether they are right, is decided by an architecture and its head.
@each_kind(lambda kind: kind.reads_tokens, fast=in_share(0, trains=True))
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_padded_and_one_by_one(kind, every):
    model, rows = kind.shaken(), kind.rows(LENGTHS)
    every = every or is_first_of(kind, "architecture") or is_of_the_head(kind, model)
    plain, exact = plain_pair(kind, model)
    peer, expected = plain.loss(rows), exact.loss(rows)
    peers, exactly = plain.gradients(peer), exact.gradients(expected)
    for way in ways_of(kind, model, rows, every=every):
        together = way(model, pack(rows, range(len(rows))))
        assert_no_further(together, peer, expected, f"the loss, {way}")
        assert_gradients_no_further(gradients(model, together), peers, exactly)
    alone = torch.stack([way(model, pack(rows, [i])) for i in range(len(rows))]).sum()
    assert_no_further(alone, peer, expected, "the sum of losses")
    assert_gradients_no_further(gradients(model, alone), peers, exactly)


def assert_equals_own(model: Any, way: Forward, rows: list[Example]) -> None:
    """Assert that packed rows give the loss and gradients that the model itself gives."""
    loss, peer = way(model, pack(rows, range(len(rows)))), own_loss(model, rows)
    ours, peers = gradients(model, loss), gradients(model, peer)
    exact = own_loss(model.double(), rows)
    assert_no_further(loss, peer, exact, "the loss")
    assert_gradients_no_further(ours, peers, gradients(model, exact))


# A model may come in float16 too, which is what some GPUs of Apple's have.
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((each, torch.bfloat16) for each in (*ARCHITECTURES, *STATES)),
        ("llama", torch.float16),
        *(
            pytest.param(each, torch.float16, marks=pytest.mark.slow)
            for each in (*ARCHITECTURES, *STATES, "gemma2", "qwen3_moe", "gpt_oss")
            if each != "llama"
        ),
    ],
)
@pytest.mark.thinned(one_in=3, first=1)
def test_16_bits_take_the_same_way(architecture, dtype):
    model = tiny(architecture, dtype=dtype)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    chosen, notices = choose_forward(model, ROWS)
    packs = architecture not in NEVER_PACKED
    assert chosen.packed == packs
    assert chosen.head
    assert packs or "packing does not suit" in notices[0]
    with torch.no_grad():
        ours = chosen(model, pack(ROWS, range(len(ROWS))))
        peer = own_loss(model, ROWS)
        exact = own_loss(model.double(), ROWS)
        assert_no_further(ours, peer, exact, slack=torch.finfo(dtype).eps)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_filler_has_a_gradient_where_padding_has_none(packed):
    """Gemma 3n divides by the length of its states, which for a padding token is 0. It divides by
    short lengths too, where a few roundings are most of an error: several draws count as one."""
    config = small_config("gemma3n_text")
    rows = examples([3, 40, 5], vocabulary=config.vocab_size)
    drawn: list[tuple[dict[str, Tensor], ...]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        assert model.get_input_embeddings().weight[config.pad_token_id].eq(0).all()
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
        chosen, notices = choose_forward(model, rows)
        assert (chosen.packed, chosen.head, notices) == (True, Head(Logits(softcap=30.0)), [])
        loss = Forward(packed, chosen.head)(model, pack(rows, range(len(rows))))
        ours, peers = gradients(model, loss), gradients(model, own_loss(model, rows))
        drawn.append((ours, peers, gradients(model, own_loss(model.double(), rows))))
    pooled = [
        {name: torch.stack([each[name] for each in side]) for name in side[0]}
        for side in zip(*drawn, strict=True)
    ]
    assert_gradients_no_further(*pooled)


def test_a_pass_holds_virtual_tokens_too():
    seen: list[int] = []
    model = shake(veneer.attach(tiny("llama"), veneer.Method("prompt", virtual_tokens=5), seed=3))
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    course = veneer.TrainConfig(
        steps=3, lr=0.01, tokens_per_step=64, tokens_per_batch=64, recompute="full"
    )
    rows = examples([5] * 24)
    list(veneer.train(model, rows, course, held_out=rows[:9]))
    assert seen
    # Filled up with one row of nothing, which has virtual tokens of its own.
    assert max(seen) <= 2 * 64
    assert {tokens % 64 for tokens in seen if tokens > 30} == {0}


def test_the_sliding_window_matters_here():
    model = new_model("mistral")
    assert max(len(row.tokens) for row in ROWS) > 2 * model.config.sliding_window
    narrow = float(own_loss(model, ROWS))
    model.config.sliding_window = None
    assert abs(float(own_loss(model, ROWS)) - narrow) > 1e-3 * narrow


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_attention_the_model_came_with(attention):
    model = new_model("llama")
    model.set_attn_implementation(attention)
    chosen, notices = choose_forward(model, ROWS)
    assert (taken(chosen), notices) == ((True, True), [])
    assert_equals_own(model, chosen, ROWS)
    assert model.config._attn_implementation == attention


def test_a_model_that_sees_its_neighbours_is_padded():
    model = new_model("llama")

    class Leaky(torch.nn.Module):
        """Adds to each place the one before it, in its row or in the row before."""

        def __init__(self, original: torch.nn.Module) -> None:
            super().__init__()
            self.original = original

        def forward(self, x: Tensor) -> Tensor:
            return self.original(x + F.pad(x, (0, 0, 1, 0))[:, :-1])

    block = model.model.layers[0].mlp
    block.up_proj = Leaky(block.up_proj)
    chosen, notices = choose_forward(model, ROWS)
    assert taken(chosen) == (False, True)
    assert len(notices) == 1
    assert "padded" in notices[0]
    assert_equals_own(model, chosen, ROWS)


def test_choosing_leaves_the_model_as_it_was():
    model = new_model("llama", dropout=0.5).train()
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        chosen, _ = choose_forward(model, ROWS)
        assert taken(chosen) == (True, True)
        assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in model.parameters())


def test_steps_and_notices_of_a_run_that_falls_back():
    model = new_model("mamba", "all")
    events = list(
        veneer.train(
            model, ROWS, veneer.TrainConfig(steps=2, lr=0.01, tokens_per_step=60), held_out=ROWS[:2]
        )
    )
    assert [type(event) for event in events[:1]] == [Notice]
    assert sum(isinstance(event, Step) for event in events) == 2
    assert any(isinstance(event, Evaluated) for event in events)


def test_rows_that_nothing_may_stand_beside_are_computed_one_by_one():
    model = new_model("llama")

    class Crowded(torch.nn.Module):
        """Adds to each place the mean of all places, of its own row and of others."""

        def __init__(self, original: torch.nn.Module) -> None:
            super().__init__()
            self.original = original

        def forward(self, x: Tensor) -> Tensor:
            return self.original(x + x.mean((0, 1), keepdim=True))

    block = model.model.layers[0].mlp
    block.up_proj = Crowded(block.up_proj)
    chosen, notices = choose_forward(model, ROWS)
    assert (chosen.packed, chosen.alone, chosen.head) == (False, True, Head())
    assert len(notices) == 1
    assert "one by one" in notices[0]
    assert_equals_own(model, chosen, ROWS)
