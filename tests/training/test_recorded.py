"""Passes as graphs: of few sizes, the same losses and gradients, or none and a reason.

`StandIn` plays the part of a CUDA graph, and torch's flash kernel is computed by its formula.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.closeness import assert_no_further
from support.flash_by_formula import attends_as_on_a_card  # noqa: F401
from support.random_adapters import shake
from support.recorders import StandIn
from support.tiny_models import VOCAB, tiny
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import Batch, pack
from veneer.fused.forward import choose_forward
from veneer.kernels.graphs import NONE_HERE, Graphs
from veneer.training import recorded
from veneer.training.config import TrainConfig
from veneer.training.events import Notice, Step
from veneer.training.loop import train
from veneer.training.recorded import RecordedPasses, Sizes


def rows(*lengths: int, seed: int = 0) -> list[Example]:
    """Return rows whose first half has no labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [UNLABELLED] * (length // 2) + tokens[length // 2 :]
        examples.append(Example(tokens, labels, "row", number))
    return examples


BATCHES = [rows(9, 14, 30, seed=1), rows(20, 21, seed=2), rows(5, 6, 7, 8, 9, seed=3)]


def model_of(architecture: str, dtype: torch.dtype, **options: Any) -> Any:
    model = tiny(architecture, dtype=dtype)
    return shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all", **options)), size=0.2)


def batch(examples: list[Example]) -> Batch:
    return pack(examples, range(len(examples)))


def losses_and_gradients(model: Any, graphs: Graphs | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return each batch's loss, and the gradients of all."""
    forward, _ = choose_forward(model, BATCHES[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in trained]
    if graphs is None:
        losses = []
        for examples in BATCHES * 2:
            loss = forward(model, batch(examples))
            (loss / 50).backward()
            losses.append(loss.detach())
        return losses, gradients
    graphs._changes = gradients
    passes = RecordedPasses(model, forward, gradients, tokens_per_batch=64, graphs=graphs)
    return [passes(batch(examples), 50) for examples in BATCHES * 2], gradients


@pytest.mark.usefixtures("attends_as_on_a_card")
@pytest.mark.parametrize(
    "kind",
    [("llama", {}), pytest.param(("mistral", {"dora": True}), marks=pytest.mark.slow)],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_passes(kind):
    architecture, options = kind
    recorder = StandIn()
    graphs = Graphs(recorder)
    # In float64, which the formula takes here and whose proof allows no more than rounding.
    ours, our_gradients = losses_and_gradients(
        model_of(architecture, torch.float64, **options), graphs
    )
    assert graphs.why_not is None
    assert (recorder.recorded, recorder.replayed) == (1, 6)  # all batches are of one size
    own, gradients = losses_and_gradients(model_of(architecture, torch.float64, **options), None)
    for x, y in zip([*ours, *our_gradients], [*own, *gradients], strict=True):
        assert_no_further(x, y, y)  # losses are summed in float32


def test_sizes_hold_their_batches():
    for examples in BATCHES:
        each = batch(examples)
        sizes = Sizes.of(each, 1)
        assert sizes.tokens == len(each.tokens)
        assert sizes.labelled >= (each.labels >= 0).sum()
        assert sizes.rows >= len(each.lengths)
        assert sizes.longest >= each.lengths.max()


def test_a_pass_that_needs_lengths_is_not_recorded():
    """As attention over padded groups does, which a card without a flash kernel takes."""
    model = model_of("llama", torch.float32)
    graphs = Graphs(StandIn())
    ours, _ = losses_and_gradients(model, graphs)
    assert "its attention takes rows by their lengths" in (graphs.notice() or "")
    own, _ = losses_and_gradients(model_of("llama", torch.float32), None)
    assert [float(x) for x in ours] == [float(x) for x in own]


def test_what_cannot_be_recorded_is_known_before():
    model = model_of("llama", torch.float32, dropout=0.1)
    forward, _ = choose_forward(model, BATCHES[0])
    assert "dropout draws anew" in str(recorded.why_not_recorded(model, forward))
    model = model_of("qwen2", torch.float32)
    forward, _ = choose_forward(model, BATCHES[0])
    assert recorded.why_not_recorded(model, forward) is None
    model.lm_head.weight.requires_grad_(True)
    assert "the head trains" in str(recorded.why_not_recorded(model, forward))


def test_a_run_without_graphs_says_so_and_is_the_same():
    def run(**options: Any) -> list[Any]:
        config = TrainConfig(steps=3, lr=1e-3, tokens_per_step=64, **options)
        return list(train(model_of("llama", torch.float32), BATCHES[0] * 3, config))

    events = run(replay_passes=True)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any(NONE_HERE in text for text in notices)
    losses = [[e.loss for e in each if isinstance(e, Step)] for each in (events, run())]
    assert losses[0] == losses[1]
