"""The cross-entropy over labelled rows equals that over all, and so do its gradients."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.linear import LoRALinear
from veneer.adapter.new_tokens import NewTokenHead
from veneer.kernels import cross_entropy
from veneer.kernels.cross_entropy import IGNORED, Labelled, Logits, labelled_cross_entropy

DOUBLE = {"dtype": torch.float64}
DIM, VOCAB = 6, 11


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    frozen = nn.Linear(DIM, VOCAB, bias=False, **DOUBLE).requires_grad_(False)
    adapted = LoRALinear(nn.Linear(DIM, VOCAB, **DOUBLE), ActiveAdapters())
    adapted.attach(
        "a", Adapter(torch.randn(2, DIM).double(), torch.randn(VOCAB, 2).double(), scaling=2.0)
    )
    adapted.active_adapters.weights = {"a": 1.0}
    rows = nn.Parameter(torch.randn(3, DIM, **DOUBLE))
    return {
        "frozen": frozen,
        "trained": nn.Linear(DIM, VOCAB, **DOUBLE),
        "adapted": adapted,
        "new tokens": NewTokenHead(
            nn.Linear(DIM, VOCAB - 3, bias=False, **DOUBLE), rows, VOCAB - 3, ActiveAdapters()
        ),
    }


LOGITS = {
    "plain": Logits(),
    "scaled": Logits(0.3),
    "capped": Logits(softcap=1.5),
    "scaled and capped": Logits(4.0, 1.5),
}


@pytest.mark.parametrize("behind", LOGITS)
def test_the_slope_of_logits_is_that_of_autograd(behind):
    logits, z = LOGITS[behind], torch.linspace(-5, 5, 41, **DOUBLE, requires_grad=True)
    y = logits(z)
    (expected,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(torch.ones_like(z) * logits.slope(y), expected)


@pytest.mark.parametrize("behind", LOGITS)
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("labelled", [0, 1, 8, 20])
@pytest.mark.parametrize("kind", heads())
@pytest.mark.thinned(pairs=True)
def test_labelled_cross_entropy(kind, labelled, chunk, factor, behind, monkeypatch):
    logits = LOGITS[behind]
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
    head = heads()[kind]
    hidden = torch.randn(20, DIM, **DOUBLE, requires_grad=True)
    labels = torch.full((20,), IGNORED)
    labels[torch.randperm(20)[:labelled]] = torch.randint(0, VOCAB, (labelled,))
    inputs = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    losses = labelled_cross_entropy(hidden, Labelled.of(labels), head, logits)
    own = logits(head(hidden))
    every = F.cross_entropy(own, labels, ignore_index=IGNORED, reduction="none")
    expected = every[labels != IGNORED]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    for weights in (torch.tensor(factor), factor * torch.randn(labelled)):
        weighted, of_expected = (losses * weights).sum(), (expected * weights).sum()
        torch.testing.assert_close(
            torch.autograd.grad(weighted, inputs, retain_graph=True),
            torch.autograd.grad(of_expected, inputs, retain_graph=True),
        )
    sums = torch.autograd.grad(losses.sum() * factor, inputs)  # one weight for all
    torch.testing.assert_close(sums, torch.autograd.grad(expected.sum() * factor, inputs))


@pytest.mark.parametrize("kind", heads())
def test_labelled_cross_entropy_without_a_gradient_for_hidden(kind):
    head = heads()[kind]
    hidden, labels = torch.randn(5, DIM, **DOUBLE), torch.tensor([1, IGNORED, 4, 9, 0])
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    loss = labelled_cross_entropy(hidden, Labelled.of(labels), head).sum()
    assert loss.requires_grad == bool(trained)
    if trained:
        expected = F.cross_entropy(head(hidden), labels, reduction="sum")
        torch.testing.assert_close(
            torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
        )


def test_labelled_cross_entropy_measures_a_head_whose_adapter_rests():
    head = heads()["adapted"]
    head.active_adapters.weights = {}
    hidden, labels = torch.randn(5, DIM, **DOUBLE), torch.tensor([1, IGNORED, 4, 9, 0])
    with torch.no_grad():
        loss = labelled_cross_entropy(hidden, Labelled.of(labels), head).sum()
        expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_sums_of_several_batches(monkeypatch):
    """They are each what it is by itself, wherever chunks end, and so are the gradients."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * VOCAB)
    head, hidden = heads()["frozen"], torch.randn(13, DIM, **DOUBLE, requires_grad=True)
    labels, counts, weights = torch.randint(0, VOCAB, (13,)), [3, 0, 9, 1], [1.0, 2.0, 0.5, -3.0]
    losses = labelled_cross_entropy(hidden, Labelled.of(labels), head)
    sums = torch.stack([own.sum() for own in losses.split(counts)])
    weighted = sums @ sums.new_tensor(weights)
    (gradient,) = torch.autograd.grad(weighted, hidden)
    for own, weight, of_sum, own_labels, own_gradient in zip(
        hidden.detach().split(counts),
        weights,
        sums,
        labels.split(counts),
        gradient.split(counts),
        strict=True,
    ):
        own.requires_grad_()
        alone = labelled_cross_entropy(own, Labelled.of(own_labels), head).sum()
        torch.testing.assert_close(of_sum, alone)
        torch.testing.assert_close(own_gradient, torch.autograd.grad(weight * alone, own)[0])


def test_no_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * VOCAB)
    head, seen, plain = heads()["frozen"], [], cross_entropy.cross_entropy

    def noted(logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(logits.numel())
        return plain(logits, *others)

    monkeypatch.setattr(cross_entropy, "cross_entropy", noted)
    hidden = torch.randn(30, DIM, **DOUBLE, requires_grad=True)
    labels = torch.randint(0, VOCAB, (30,)).index_fill(0, torch.arange(0, 30, 3), IGNORED)
    labelled_cross_entropy(hidden, Labelled.of(labels), head)
    assert max(seen) <= 4 * VOCAB
    assert sum(seen) == 20 * VOCAB


class NothingLeft(nn.Linear):
    """A head that begins with a chunk only when the logits of the one before are gone."""

    before: tuple[weakref.ref, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        assert all(logits() is None for logits in self.before)
        y = super().forward(x)
        self.before = (weakref.ref(y),)
        return y


def test_a_chunk_is_gone_before_the_next_one_begins(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * VOCAB)
    head, hidden = NothingLeft(DIM, VOCAB), torch.randn(10, DIM, requires_grad=True)
    labelled_cross_entropy(hidden, Labelled.of(torch.arange(10)), head).sum().backward()
    assert head.before
    assert head.weight.grad is not None
