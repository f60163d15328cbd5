"""Laws 7 and 8: how rows are laid out and cut into batches changes neither loss nor gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import veneer
from support.random_adapters import (
    NEW_TOKENS,
    distance,
    examples,
    shake,
    targets_named,
    tokenizer,
    trained_weights,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, VOCAB, tiny
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.training.events import Evaluated, Notice, Step

ROWS = examples([17, 5, 30, 12, 5, 24, 2])
FUSED = ("llama", "mistral", "qwen2")  # whose layers are the two functions of fused/block.py
EVERY_WAY = [Forward(packed, head) for packed in (True, False) for head in (True, False)]


def new_model(architecture: str, targets: str = "everything", **options: Any) -> Any:
    model = tiny(architecture)
    config = veneer.LoRA(rank=2, targets=targets_named(model, targets), **options)
    return shake(veneer.attach(model, config))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def one_by_one(model: Any, rows: list[Example]) -> Tensor:
    """Return the sum of the losses as the model itself would give them."""
    total = torch.zeros(())
    for row in rows:
        tokens, labels = torch.tensor([row.tokens]), torch.tensor([row.labels])
        out = model(input_ids=tokens, use_cache=False).logits
        total = total + F.cross_entropy(
            out[0, :-1], labels[0, 1:], ignore_index=UNLABELLED, reduction="sum"
        )
    return total


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], close: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name in wanted:
        assert distance(found[name], wanted[name]) < close, name


def taken(way: Forward) -> tuple[bool, bool]:
    return way.packed, way.labelled_head


def accepted(model: Any) -> list[Forward]:
    """Return every way that may be taken of this model, by choose_forward's own measure."""
    from veneer.fused import forward as room

    rows = [replace(row, labels=row.tokens) for row in ROWS[:3]]
    with torch.no_grad():
        own = float(one_by_one(model, rows))
        return [way for way in EVERY_WAY if room._why_not(way, model, rows, own) is None]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_padded_and_one_by_one(architecture, kind):
    model = new_model(architecture, **KINDS[kind])
    chosen, notices = choose_forward(model, ROWS)
    falls_back = architecture == "falcon"
    assert taken(chosen) == (not falls_back, True)
    assert bool(notices) == falls_back
    ways = accepted(model)
    assert set(ways) == {way for way in EVERY_WAY if not (falls_back and way.packed)}

    assert bool(chosen.layers) == (architecture in FUSED)
    ways += [replace(chosen, recompute=how) for how in ("none", "selective", "full")]

    wanted = one_by_one(model, ROWS)
    reference = gradients(model, wanted)
    for way in ways:
        together = way(model, pack(ROWS, range(len(ROWS))))
        torch.testing.assert_close(together, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, together), reference)
        alone = sum(way(model, pack(ROWS, [i])) for i in range(len(ROWS)))
        torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, alone), reference)


def behind_virtual_tokens(architecture: str, method: str, **options: Any) -> Any:
    model = tiny(architecture)
    config = veneer.Method(method, virtual_tokens=5, **options)  # type: ignore[arg-type]
    return shake(veneer.attach(model, config, seed=3))


VIRTUAL: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix"},
    "prefix by an MLP": {"method": "prefix", "prefix_mlp": 6},
    "prompt": {"method": "prompt"},
}


@pytest.mark.parametrize("case", VIRTUAL)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_virtual_tokens(architecture, case):
    model = behind_virtual_tokens(architecture, **VIRTUAL[case])
    chosen, _ = choose_forward(model, ROWS)
    falls_back = architecture == "falcon"
    assert taken(chosen) == (not falls_back, True)
    ways = accepted(model)
    assert set(ways) == {way for way in EVERY_WAY if not (falls_back and way.packed)}
    # A prefix is none of what the two functions know.
    assert bool(chosen.layers) == (architecture in FUSED and case == "prompt")
    for how in ("selective", "full"):
        sparing, notices = choose_forward(model, ROWS, recompute=how)
        assert any("Selective" in notice for notice in notices) == (
            how == "selective" and not chosen.layers
        )
        ways.append(sparing)
    ways.append(chosen)
    if architecture == "falcon":
        ways.append(replace(EVERY_WAY[2], recompute="full"))

    wanted = one_by_one(model, ROWS)
    reference = gradients(model, wanted)
    assert all(name.startswith("veneer_virtual.") for name in reference)
    for way in ways:
        together = way(model, pack(ROWS, range(len(ROWS))))
        torch.testing.assert_close(together, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, together), reference, 2e-5)
        alone = sum(way(model, pack(ROWS, [i])) for i in range(len(ROWS)))
        torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, alone), reference, 2e-5)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_in_float64(method):
    model = behind_virtual_tokens("mistral", method).double()
    wanted = one_by_one(model, ROWS)
    reference = gradients(model, wanted)
    choose_forward(model, ROWS)  # which makes the packed attention known
    for way in EVERY_WAY:
        loss = way(model, pack(ROWS, range(len(ROWS))))
        torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-6, atol=0)
        assert_same(gradients(model, loss), reference, 1e-6)


def test_a_pass_holds_virtual_tokens_too():
    seen: list[int] = []
    model = behind_virtual_tokens("llama", "prompt")
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
    narrow = float(one_by_one(model, ROWS))
    model.config.sliding_window = None
    assert abs(float(one_by_one(model, ROWS)) - narrow) > 1e-3 * narrow


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_attention_the_model_came_with(attention):
    model = new_model("llama")
    model.set_attn_implementation(attention)
    chosen, notices = choose_forward(model, ROWS)
    assert (taken(chosen), notices) == ((True, True), [])
    batch = pack(ROWS, range(len(ROWS)))
    torch.testing.assert_close(chosen(model, batch), one_by_one(model, ROWS), rtol=1e-5, atol=0)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_new_words(architecture):
    model = tiny(architecture)
    words = with_new_tokens(model, tokenizer())
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    for weight in words.parameters():
        weight.requires_grad_(True)
    rows = examples([14, 9, 20], vocabulary=VOCAB + len(NEW_TOKENS), seed=2)
    assert any(token >= VOCAB for row in rows for token in row.labels)
    wanted = one_by_one(model, rows)
    reference = gradients(model, wanted)
    chosen, notices = choose_forward(model, rows)
    assert (taken(chosen), notices) == ((True, True), [])
    for way in EVERY_WAY:
        loss = way(model, pack(rows, range(3)))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, loss), reference)


def test_an_adapted_head():
    model = new_model("qwen2", "lm_head")
    reference = gradients(model, wanted := one_by_one(model, ROWS))
    for way in accepted(model):
        loss = way(model, pack(ROWS, range(len(ROWS))))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        assert_same(gradients(model, loss), reference)


def scaled(model: Any, how: Any) -> Any:
    """Let the model change its logits after the head, as some architectures do."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = how(out.logits)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("how", [lambda x: 0.5 * x, torch.tanh], ids=["scaled", "capped"])
@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_a_head_whose_logits_are_changed(architecture, how):
    plain = float(one_by_one(new_model(architecture), ROWS))
    model = scaled(new_model(architecture), how)
    chosen, notices = choose_forward(model, ROWS)
    assert taken(chosen) == (architecture != "falcon", False)
    assert any("labelled ones alone do not suit" in notice for notice in notices)
    wanted = one_by_one(model, ROWS)
    assert abs(float(wanted) - plain) > 0.01 * plain
    loss = chosen(model, pack(ROWS, range(len(ROWS))))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert_same(gradients(model, loss), gradients(model, one_by_one(model, ROWS)))


def test_a_model_that_sees_its_neighbours_is_padded():
    model = new_model("llama")

    class Leaky(torch.nn.Module):
        """Adds to each place what stands before it, in the row or in the row before."""

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
    loss = chosen(model, pack(ROWS, range(len(ROWS))))
    torch.testing.assert_close(loss, one_by_one(model, ROWS), rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_takes_the_same_way(architecture, dtype):
    model = tiny(architecture, dtype=dtype)
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    chosen, _ = choose_forward(model, ROWS)
    assert taken(chosen) == (architecture != "falcon", True)
    with torch.no_grad():
        wanted = float(one_by_one(model.float(), ROWS))
        model.to(dtype)
        found = float(chosen(model, pack(ROWS, range(len(ROWS)))))
    assert abs(found - wanted) < 0.02 * wanted


# Law 8.

COURSE = veneer.TrainConfig(steps=1, lr=0.01, warmup=0, tokens_per_step=1000, clip=0)


def lopsided() -> list[Example]:
    """Return rows of which some are learnt whole and some at one token."""
    rows = examples([20, 6, 15, 30, 9, 12], seed=5, learnt=0.0)
    return [
        replace(row, labels=[UNLABELLED, *row.tokens[1:]]) if i % 2 else row
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulation_equals_the_large_batch(architecture):
    rows = lopsided()
    results = []
    for tokens_per_batch in (None, 32, 1):
        model = new_model(architecture)
        course = replace(COURSE, tokens_per_batch=tokens_per_batch)
        before = trained_weights(model)
        steps = [e for e in veneer.train(model, rows, course) if isinstance(e, Step)]
        results.append((steps[0], trained_weights(model)))
    (large, weights), *others = results
    assert large.label_tokens == sum(row.label_tokens for row in rows)
    assert large.tokens == sum(len(row.tokens) for row in rows)
    for step, its_weights in others:
        assert (step.tokens, step.label_tokens) == (large.tokens, large.label_tokens)
        assert abs(step.loss - large.loss) < 1e-6 * large.loss
        for name, weight in weights.items():
            moved = weight - before[name]
            # AdamW's first step has the size of the learning rate whatever the gradient, and
            # where a gradient is all but nothing, rounding decides its sign.
            apart = (its_weights[name] - weight).abs() > 1e-6
            assert float(apart.float().mean()) < 0.01, name
            assert moved.norm() > 0


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_accumulation_behind_virtual_tokens(method):
    found = []
    for tokens_per_batch in (None, 40, 1):
        model = behind_virtual_tokens("gpt2", method)
        course = replace(COURSE, tokens_per_batch=tokens_per_batch)
        steps = [e for e in veneer.train(model, lopsided(), course) if isinstance(e, Step)]
        found.append((steps[0], trained_weights(model)))
    (large, weights), *others = found
    for step, its_weights in others:
        assert abs(step.loss - large.loss) < 1e-6 * large.loss
        for name, weight in weights.items():
            assert float(((its_weights[name] - weight).abs() > 1e-6).float().mean()) < 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulated_gradients_equal_those_of_the_large_batch(architecture, monkeypatch):
    rows, found = lopsided(), []

    def keep(weights: Any, norm: float) -> Tensor:
        (flat,) = weights
        found.append(flat.grad.clone())
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    for tokens_per_batch in (None, 32, 1):
        course = replace(COURSE, tokens_per_batch=tokens_per_batch)
        list(veneer.train(new_model(architecture), rows, course))
    model = new_model(architecture)
    mean = one_by_one(model, rows) / sum(row.label_tokens for row in rows)
    whole = [grad.flatten() for grad in gradients(model, mean).values()]
    large, *others = [flat.split([len(grad) for grad in whole]) for flat in found]
    for other in (*others, whole):
        for a, b in zip(large, other, strict=True):
            assert distance(a, b) < 1e-5


def test_steps_and_notices_of_a_run_that_falls_back():
    model = new_model("falcon", "attention")
    events = list(
        veneer.train(model, ROWS, replace(COURSE, steps=2, tokens_per_step=60), held_out=ROWS[:2])
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
    assert (chosen.packed, chosen.alone, chosen.labelled_head) == (False, True, True)
    assert len(notices) == 1
    assert "one by one" in notices[0]
    wanted = one_by_one(model, ROWS)
    loss = chosen(model, pack(ROWS, range(len(ROWS))))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert_same(gradients(model, loss), gradients(model, one_by_one(model, ROWS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "falcon_h1"])
def test_states_that_pass_from_row_to_row_are_noticed(architecture, dtype):
    model = tiny(architecture).to(dtype)
    chosen, notices = choose_forward(model, ROWS)
    assert not chosen.packed
    assert "packing does not suit" in notices[0]
    with torch.no_grad():
        found = float(chosen(model, pack(ROWS, range(len(ROWS)))))
        wanted = float(one_by_one(model, ROWS))
    assert abs(found - wanted) < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] * wanted
