"""Law 9: a pass over several adapters, each with rows of its own, equals a pass for each."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from support.closeness import assert_gradients_no_further_as_a_rule, assert_no_further
from support.kinds import KINDS, Kind
from support.plain import Float64, Plain
from support.random_adapters import shake, tokenizer, with_new_tokens
from support.tiny_models import tiny
from veneer.adapter.active import Segments, active_adapters_of
from veneer.adapter.parameters import experts_of
from veneer.adapter.use import acting
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import Batch, pack
from veneer.fused import together
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.head import Head
from veneer.fused.together import AdapterBatch, backward_together, of_like_shape, why_alone
from veneer.models.device import CPU, RandomNumbers
from veneer.training.begin import let_train

# With the invocation of the kind that acts from one on; for the others they are any tokens.
ROWS = next(kind for kind in KINDS if kind.invocation).rows([7, 19, 12, 5, 9, 16])
# The rows of each adapter; the kind's own is none that begins where the batch does.
BATCHES = {"wide": [1], "default": [0, 3], "dora": [5, 2, 4]}
LABELS = {"wide": 18, "default": 10, "dora": 34}


def beside(kind: Kind) -> Any:
    """Return a model with the kind's adapter, and beside it a wide one and a DoRA. It is in
    training mode, in which adapters drop out, but where the base is quantized."""
    model = kind.fresh()
    stacks = any(experts_of(model))  # of which there is no DoRA, and which drop nothing out
    targets, dropout = ("attention", 0.0) if stacks else ("all", 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)  # of uncovered weights
        wide, dora = (
            veneer.LoRA(rank=5, targets="all", dropout=dropout),
            veneer.LoRA(rank=2, targets=targets, dora=True),
        )
        veneer.attach(model, wide, name="wide", seed=1)
        veneer.attach(model, dora, name="dora", seed=2)
    all_train(model)
    return shake(model, size=0.2).train(not kind.bits)


def batches() -> list[AdapterBatch]:
    return [
        AdapterBatch(name, packed(name), LABELS[name], drawing(number))
        for number, name in enumerate(BATCHES)
    ]


def drawing(seed: int) -> RandomNumbers:
    return RandomNumbers(CPU, torch.Generator().manual_seed(seed))


def packed(name: str) -> Batch:
    return pack(ROWS, BATCHES[name])


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients that have added up, and forget them."""
    named = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return named


def each_alone(forward: Forward, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and gradients of a pass for each adapter."""
    losses = []
    for number, name in enumerate(BATCHES):
        torch.manual_seed(number)
        with acting(model, name):
            losses.append(forward(model, packed(name)))
            (losses[-1] / LABELS[name]).backward()
    return torch.stack(losses).detach(), gradients(model)


def exactly(kind: Kind, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and gradients in float64: by passes for each adapter with the same masks,
    or by plain operations."""
    if not kind.bits:
        wide = copy.deepcopy(model).double()
        if any(experts_of(wide)):
            wide.set_experts_implementation("eager")  # float64 has no grouped products
        with Float64():
            return each_alone(choose_forward(wide, ROWS)[0], wide)
    losses, of_all = [], {}
    for name in BATCHES:
        with acting(model, name):
            plain = Plain(kind, model, torch.float64)
        losses.append(plain.loss([ROWS[i] for i in BATCHES[name]]))
        of_all |= plain.gradients(losses[-1] / LABELS[name])
    return torch.stack(losses).detach(), of_all


SEEDS = range(6)  # of the weights
FAST = ("lora, llama", "dora, qwen2, 4 bits", "head, qwen2", "activated, llama")
SHARING = [kind for kind in KINDS if (kind.mixes_rows or kind.invocation) and not kind.beside]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if str(k) in FAST else pytest.mark.slow) for k in SHARING],
    ids=str,
)
def test_a_pass_for_all_equals_a_pass_for_each(kind):
    model = beside(kind)
    forward, _ = choose_forward(model, ROWS)
    alone = why_alone(forward, model, list(BATCHES), ROWS)
    assert set(alone) == (set() if forward.packed else set(BATCHES))
    draws = []
    for seed in SEEDS:
        shake(model, seed=seed, size=0.2)
        losses = backward_together(forward, model, batches(), alone=alone)
        ours = gradients(model)
        peer, theirs = each_alone(forward, model)
        exact, expected = exactly(kind, model)
        assert_no_further(losses, peer, exact)
        draws.append((ours, theirs, expected))
    assert_gradients_no_further_as_a_rule(draws)
    assert_gradients_no_further_as_a_rule([(theirs, ours, exact) for ours, theirs, exact in draws])
    assert veneer.in_use(model) == {}


@cache
def of_llama(recompute: Any = "none") -> tuple[Any, Forward]:
    model = beside(Kind("lora", "llama", lora={"dropout": 0.5}))
    forward, _ = choose_forward(model, ROWS, recompute=recompute)
    return model, forward


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_layers_are_computed_again_with_the_same_masks(recompute):
    model, forward = of_llama(recompute)
    each = batches()
    losses = backward_together(forward, model, each)
    ours = gradients(model)
    plain = replace(forward, recompute="none")
    others = batches()
    assert torch.equal(losses, backward_together(plain, model, others))
    assert_equal(ours, gradients(model))
    for one, other in zip(each, others, strict=True):  # which go on with the same masks
        assert torch.equal(one.random.generator.get_state(), other.random.generator.get_state())


def test_numbers_that_are_not_finite_stay_with_their_adapter():
    model, forward = of_llama.__wrapped__()  # of its own, since it is spoilt
    before, gradients_before = backward_together(forward, model, batches()), gradients(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".wide.lora_" in name:
                weight.fill_(torch.nan)
    after, gradients_after = backward_together(forward, model, batches()), gradients(model)
    assert after.isfinite().tolist() == [name != "wide" for name in BATCHES]
    assert torch.equal(after[1:], before[1:])
    others = [name for name in gradients_before if ".wide." not in name]
    assert_equal({n: gradients_after[n] for n in others}, {n: gradients_before[n] for n in others})


class BaseProducts(TorchDispatchMode):
    """Counts the matrix products with each frozen weight of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        self.counts = {weight.untyped_storage().data_ptr(): 0 for weight in frozen}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            for x in args:
                if (place := x.untyped_storage().data_ptr()) in self.counts:
                    self.counts[place] += 1
        return func(*args, **kwargs or {})


def test_the_base_is_multiplied_once_for_all():
    """Whatever their number: as often as for one adapter with the rows of all."""
    model, forward = of_llama()
    whole = AdapterBatch("wide", pack(ROWS, range(len(ROWS))))
    counts = []
    for work in ([whole], batches()[:2]):  # DoRA's norms take one product more
        with BaseProducts(model) as products:
            backward_together(forward, model, work)
        counts.append(products.counts)
        assert gradients(model)
    assert counts[0] == counts[1]
    # There and back, but into the embedding, and the head.
    assert sum(counts[0].values()) == 2 * 7 * len(forward.layers) - 3 + 2


def test_one_adapter_has_the_pass_that_it_has_by_itself():
    model, forward = of_llama()
    _, own, _ = batches()
    losses = backward_together(forward, model, [own])
    ours, (peer, theirs) = gradients(model), each_alone(forward, model)
    assert torch.equal(losses, peer[1:2])
    assert_equal(ours, {name: g for name, g in theirs.items() if ".default." in name})
    _, among_others, _ = each = batches()
    backward_together(forward, model, each)
    assert gradients(model)
    assert torch.equal(own.random.generator.get_state(), among_others.random.generator.get_state())


def test_heads_with_adapters_drop_out_by_their_own_generators_whatever_tokens_weigh():
    """Weights that differ let the head be computed once more on the way back."""
    model = shake(with_two("llama", targets=["q_proj", "lm_head"], dropout=0.5)).train()
    forward, _ = choose_forward(model, ROWS)

    def weighed(losses):
        return (losses * torch.arange(1.0, len(losses) + 1)).sum()

    both = []
    for alone in ({}, dict.fromkeys(("one", "two"), "")):
        batches = [
            AdapterBatch(name, pack(ROWS, [i, i + 2]), 9, drawing(i), weighed)
            for i, name in enumerate(("one", "two"))
        ]
        losses = backward_together(forward, model, batches, alone=alone)
        states = [each.random.generator.get_state() for each in batches]
        both.append((losses, gradients(model), states))
    (losses, ours, states), (expected, theirs, expected_states) = both
    torch.testing.assert_close(losses, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)
    assert all(map(torch.equal, states, expected_states))


@pytest.mark.parametrize(
    ("tokens", "filled"), [(5, 8), (48, 48), (127, 128), (250, 256), (257, 272)]
)
def test_rows_are_filled_up_to_few_lengths(tokens, filled):
    batch = pack([Example([3] * tokens, [3] * tokens, "", 0)], [0])
    assert len(of_like_shape(batch).tokens) == filled


def test_rows_stay_as_many_where_compiled_functions_multiply(monkeypatch):
    lengths = []

    def noted(batch):
        lengths.append(len(batch.tokens))
        return of_like_shape(batch)

    monkeypatch.setattr(together, "of_like_shape", noted)
    for compiled in (True, False):
        monkeypatch.setattr(together, "are_compiled", lambda _, compiled=compiled: compiled)
        model, forward = of_llama()
        backward_together(forward, model, batches())
        gradients(model)
        of_all = [len(each.batch.tokens) for each in batches()]
        # The wide one drops inputs out, and the kind's own too.
        assert lengths == (of_all[:2] if compiled else of_all)
        lengths.clear()


def test_a_batch_without_labels():
    """Its loss is 0, and so are its gradients."""
    model, forward = of_llama()
    *others, none = batches()
    unlabelled = replace(none.batch, labels=np.full_like(none.batch.labels, UNLABELLED))
    losses = backward_together(forward, model, [replace(none, batch=unlabelled), *others])
    assert losses[0] == 0
    assert all(not g.any() for n, g in gradients(model).items() if ".dora." in n)


def test_what_needs_a_pass_of_its_own_says_why():
    model = tiny("gpt2")
    for name in ("plain", "other"):
        veneer.attach(model, veneer.LoRA(rank=2), name=name)
    veneer.attach(model, veneer.Method(method="prefix", virtual_tokens=3), name="prefix")
    veneer.use(model, None)
    forward, _ = choose_forward(model, ROWS)
    names = ["plain", "other", "prefix"]
    assert why_alone(forward, model, names, ROWS) == {"prefix": "prefix has no low-rank factors"}
    model.transformer.h[1].attn.resid_dropout.p = 0.25
    reasons = why_alone(choose_forward(model, ROWS)[0], model, names, ROWS)
    assert reasons["plain"] == reasons["other"] == DRAWS
    alone = why_alone(replace(forward, packed=False), model, ["plain"], ROWS)
    assert alone == {"plain": "rows are not packed"}


DRAWS = "the base draws random numbers by itself in training, as dropout does"


def test_bases_whose_passes_are_not_shared():
    model = with_two("mixtral", targets="attention")
    forward, _ = choose_forward(model, ROWS)
    assert why_alone(forward, model, ["one", "two"], ROWS) == {}
    model.model.layers[1].mlp.jitter_noise = 0.1
    before = torch.get_rng_state()
    assert why_alone(forward, model, ["one", "two"], ROWS) == dict.fromkeys(["one", "two"], DRAWS)
    assert torch.equal(torch.get_rng_state(), before)
    model = tiny("llama")
    with_new_tokens(model, tokenizer())
    model = with_two(model)
    forward, _ = choose_forward(model, ROWS)
    reasons = why_alone(forward, model, ["one", "two"], ROWS)
    assert set(reasons.values()) == {"the base has new tokens"}


def test_a_trial_finds_losses_that_are_not_those_of_passes_alone(monkeypatch):
    model = with_two("llama")
    forward, _ = choose_forward(model, ROWS)
    own = Head.losses
    for wrong in (1.1, torch.nan):

        def losses(self, model, hidden, labelled, token_loss=None, wrong=wrong):
            both = active_adapters_of(model).weights == {}
            return own(self, model, hidden, labelled, token_loss) * (wrong if both else 1)

        monkeypatch.setattr(Head, "losses", losses)
        reasons = why_alone(forward, model, ["one", "two"], ROWS)
        assert set(reasons) == {"one", "two"}
        assert all("differs from" in why for why in reasons.values())


def test_a_trial_takes_two_adapters_of_each_kind():
    model, passes = tiny("llama"), []
    configs = [veneer.LoRA(rank=rank, dora=dora) for rank in (1, 2, 8) for dora in (False, True)]
    for number, config in enumerate(configs):
        veneer.attach(model, config, name=str(number))
    forward, _ = choose_forward(model, ROWS)
    model.model.register_forward_hook(lambda *_: passes.append(1))
    assert why_alone(forward, model, list(map(str, range(len(configs)))), ROWS) == {}
    assert len(passes) == 4 + 2  # each alone; all together; and one that looks for random numbers


def test_an_embedding_reads_the_tokens_of_a_batch_in_any_shape():
    model = shake(with_two("llama", targets="embed_tokens"))
    embedding, ids = model.get_input_embeddings(), torch.tensor([3, 5, 7, 5])
    segments = Segments(4, (("one", slice(3), None), ("two", slice(3, 4), None)))
    with active_adapters_of(model).by_segments(segments):
        rows = embedding(ids)
        assert torch.equal(embedding(ids[None])[0], rows)
        with pytest.raises(veneer.AdapterError, match="16 rows of a batch of 4 tokens"):
            embedding(ids.expand(4, 4))
    assert not torch.equal(rows[1], rows[3])


def with_two(base: Any, **options: Any) -> Any:
    """Return a model, or a tiny one of an architecture, with two adapters, none of which acts."""
    model = tiny(base) if isinstance(base, str) else base
    for name in ("one", "two"):
        veneer.attach(model, veneer.LoRA(rank=2, **options), name=name)
    return all_train(model)


def all_train(model: Any) -> Any:
    """Let all adapters of a model train and none act, and return it."""
    for name in veneer.adapters(model):
        let_train(model, name)  # attaching one has frozen the others
    veneer.use(model, None)
    return model


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


def test_adapters_train_beside_each_other():
    model = tiny("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets="qv"), name="first", seed=0)
    veneer.attach(model, veneer.LoRA(rank=3, lora_fa=True), name="second", seed=1)
    all_train(model)
    trains = [name for name, weight in model.named_parameters() if weight.requires_grad]
    first, second = ([n for n in trains if f".{own}." in n] for own in ("first", "second"))
    assert len(first) == 2 * 2 * len(model.model.layers)
    assert len(second) == 4 * len(model.model.layers)
    assert all(name.endswith(".second.lora_B") for name in second)
    assert len(trains) == len(first) + len(second)
    assert veneer.in_use(model) == {}
