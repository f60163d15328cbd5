"""Law 2: only what should train has a gradient, and all else is bit-equal after training."""

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.random_adapters import (
    examples,
    same,
    snapshot,
    targets_named,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, VOCAB, tiny
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.training.events import Step, Trained

COURSE = veneer.TrainConfig(
    steps=4, lr=0.05, warmup=0, weight_decay=0.1, tokens_per_step=40, tokens_per_batch=25
)


class Watched:
    """Trains a model and remembers which parameters ever received a gradient."""

    def __init__(self, model: Any, rows: list[Any], course: veneer.TrainConfig = COURSE) -> None:
        self.received: set[str] = set()
        self.base = {n: w.detach().clone() for n, w in base_parameters(model).items()}
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        before = {n: w.detach().clone() for n, w in model.named_parameters()}
        trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
        hooks = [
            w.register_post_accumulate_grad_hook(lambda _, n=n: self.received.add(n))
            for n, w in trained.items()
        ]
        for event in veneer.train(model, rows, course):
            frozen = [w for n, w in model.named_parameters() if n not in trained]
            assert not any(w.requires_grad or w.grad is not None for w in frozen)
            self.last = event
        for hook in hooks:
            hook.remove()
        self.trained = set(trained)
        self.changed = {
            n for n, w in model.named_parameters() if not torch.equal(w.detach(), before[n])
        }
        assert same(self.base, base_parameters(model))
        assert same(self.buffers, dict(model.named_buffers()))


@pytest.mark.parametrize("targets", ["attention", "everything"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_adapter_changes(architecture, targets):
    model = tiny(architecture)
    marks = fingerprint(model)
    config = veneer.LoRA(rank=2, targets=targets_named(model, targets), dropout=0.1)
    veneer.attach(model, config)
    adapter = {n for n, _ in model.named_parameters() if ".adapters." in n}
    run = Watched(model, examples([12, 9, 15, 20, 7, 11]))
    assert isinstance(run.last, Trained)
    assert run.trained == run.received == run.changed == adapter
    assert all(w.grad is None for w in model.parameters())
    assert fingerprint(model) == marks
    veneer.detach(model)
    assert same(snapshot(model), snapshot(tiny(architecture)))


def test_only_the_newest_adapter_trains():
    model = tiny("llama")
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name=name)
    run = Watched(model, examples([12, 9, 15]))
    assert run.changed == {n for n, _ in model.named_parameters() if ".adapters.b." in n}


def test_a_loaded_adapter_is_frozen(tmp_path):
    veneer.save(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / "a")
    model = veneer.load(tiny("llama"), tmp_path / "a")
    with pytest.raises(veneer.TrainingError, match="Nothing in this model trains"):
        list(veneer.train(model, examples([9]), COURSE))


def words_with_rows(architecture: str) -> tuple[Any, list[Any]]:
    model = tiny(architecture)
    words = with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.LoRA(rank=2, targets="qv"))
    for rows in words.parameters():
        rows.requires_grad_(True)
    return model, words.parameters()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_the_vocabulary_only_new_rows_change(architecture):
    model, rows = words_with_rows(architecture)
    data = examples([14, 9, 20, 11])
    for row in data:
        row.tokens[2:5] = row.labels[2:5] = [VOCAB, VOCAB + 1, VOCAB + 2]
    run = Watched(model, data)
    own = {n for n, _ in model.named_parameters() if n.endswith(".rows")}
    assert len(own) == len(rows) == (1 if model.config.tie_word_embeddings else 2)
    assert run.changed == run.received == run.trained
    assert own < run.changed
    base = tiny(architecture)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, part)().original.weight, getattr(base, part)().weight)


def test_each_new_row_has_a_gradient_where_its_word_stands():
    model, (rows, head) = words_with_rows("qwen2")
    tokens = torch.tensor([[5, VOCAB + 1, 7, 8]])
    model(tokens).logits[..., :VOCAB].sum().backward()
    reached = rows.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, False]
    assert head.grad is None or head.grad.count_nonzero() == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_train_as_those_of_a_plain_larger_model(architecture):
    model, rows = words_with_rows(architecture)
    plain = veneer.merge(model)
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    plain.requires_grad_(False)
    embedding.weight.requires_grad_(True)
    head.weight.requires_grad_(True)
    tokens = torch.randint(3, VOCAB + 3, (3, 15), generator=torch.Generator().manual_seed(2))

    def loss(model: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(
            model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )

    loss(model).backward()
    loss(plain).backward()
    for own, larger in zip(rows, (embedding, head), strict=False):
        torch.testing.assert_close(own.grad, larger.weight.grad[VOCAB:], rtol=1e-5, atol=1e-7)


def test_attention_of_a_run_is_given_back():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    before = model.config._attn_implementation
    events = veneer.train(model, examples([9, 9]), COURSE)
    while not isinstance(next(events), Step):
        pass
    events.close()
    assert model.config._attn_implementation == before
    assert not model.training
