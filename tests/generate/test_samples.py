"""Samples are drawn from what the model gives, with its adapter as it is at the moment."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import veneer
from support.closeness import assert_no_further
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer.errors import ConfigError
from veneer.generate.samples import SampleDecoder, drawn_by

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
ENDS = (2, 30, 31, 32)
DRAW = {"count": 3, "most": 9, "seeds": [1, 2, 3]}


def adapted(architecture="llama", **lora):
    model = tiny(architecture).eval().requires_grad_(False)
    return shake(veneer.attach(model, veneer.LoRA(rank=4, **lora)), size=0.3)


def decoder(model, **options):
    return SampleDecoder(model, ENDS, context=40, **options)


def log_p(model, prompt, tokens):
    """Return log p of tokens behind a prompt by the model's own forward, (tokens, vocab)."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("llama", {}),
        ("mixtral", {}),
        pytest.param("llama", {"dora": True}, marks=pytest.mark.slow),
        pytest.param("llama", {"init": "pissa"}, marks=pytest.mark.slow),
    ],
)
def test_tokens_have_the_log_probabilities_that_the_model_gives(architecture, lora):
    model = adapted(architecture, **lora)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    groups = decoder(model).samples(PROMPTS, **DRAW)
    assert {name for name, w in model.named_parameters() if w.requires_grad} == trains
    wide = copy.deepcopy(model).double()
    if architecture == "mixtral":
        wide.set_experts_implementation("eager")  # float64 has no grouped products
    for prompt, samples in zip(PROMPTS, groups, strict=True):
        assert len(samples) == DRAW["count"]
        for sample in samples:
            chosen = F.one_hot(torch.tensor(sample.tokens), model.config.vocab_size)
            own, exact = (log_p(m, prompt, sample.tokens) for m in (model, wide))
            ours = torch.tensor([sample.logprobs, sample.entropies])
            theirs, reference = (
                torch.stack([(p * chosen).sum(-1), -(p.exp() * p).sum(-1)]) for p in (own, exact)
            )
            assert_no_further(ours, theirs, reference)


def test_samples_follow_the_weights_as_they_change():
    model = adapted()
    drawing = decoder(model)
    before = drawing.samples(PROMPTS, **DRAW)
    shake(model, seed=2, size=0.3)
    after = drawing.samples(PROMPTS, **DRAW)
    fresh = decoder(model).samples(PROMPTS, **DRAW)
    assert [s.logprobs for g in after for s in g] == [s.logprobs for g in fresh for s in g]
    assert [s.logprobs for g in after for s in g] != [s.logprobs for g in before for s in g]


def test_an_answer_ends_with_an_end_token_or_its_most():
    groups = decoder(adapted()).samples(PROMPTS, count=8, most=9, seeds=[1, 2, 3])
    samples = [sample for group in groups for sample in group]
    assert {sample.ended for sample in samples} == {True, False}
    for sample in samples:
        assert not {*sample.tokens[:-1]} & {*ENDS}
        assert sample.ended == (sample.tokens[-1] in ENDS)
        assert sample.ended or len(sample.tokens) == 9
    assert len({tuple(sample.tokens) for sample in groups[0]}) > 1


def test_an_answer_does_not_depend_on_its_company():
    """To the bit, by the compiled step; otherwise but for rounding, which draws the same tokens."""
    model = adapted()
    together = decoder(model).samples(PROMPTS, **DRAW)
    alone = decoder(model, rows=3)
    if alone.runner.is_exact:
        for prompt, seed, samples in zip(PROMPTS, DRAW["seeds"], together, strict=True):
            (own,) = alone.samples([prompt], **{**DRAW, "seeds": [seed]})
            assert [vars(sample) for sample in own] == [vars(sample) for sample in samples]


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model = adapted()
    whole = decoder(model).samples(PROMPTS, **DRAW)
    monkeypatch.setattr("veneer.generate.samples.CHUNK", 2)
    pieces = decoder(model).samples(PROMPTS, **DRAW)
    assert [s.tokens for g in pieces for s in g] == [s.tokens for g in whole for s in g]


def test_the_base_alone_is_sampled_where_no_adapter_acts():
    model = adapted()
    veneer.use(model, None)
    (samples,) = decoder(model).samples([PROMPTS[0]], count=2, most=4, seeds=[5])
    own = log_p(tiny("llama").eval(), PROMPTS[0], samples[0].tokens)
    assert own.gather(1, torch.tensor(samples[0].tokens)[:, None])[:, 0].tolist() == pytest.approx(
        samples[0].logprobs, rel=1e-3
    )


def test_what_cannot_be_drawn_is_refused():
    drawing = decoder(adapted(), rows=2)
    with pytest.raises(ConfigError, match="3 answers cannot be drawn at a time in 2 slots"):
        drawing.samples(PROMPTS, **DRAW)
    with pytest.raises(ConfigError, match="leaves no room for an answer in the context of 40"):
        drawing.samples([[5] * 40], count=1, most=1, seeds=[1])


def test_a_draw_takes_each_token_as_often_as_its_chance():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    uniforms = torch.arange(400, dtype=torch.float64) / 400
    tokens, logprobs, entropies = drawn_by(chances.log().expand(400, -1), uniforms)
    counts = torch.bincount(torch.tensor(tokens).long(), minlength=6)
    assert counts.tolist() == [0, 200, 0, 100, 100, 0]
    assert logprobs[0] == pytest.approx(torch.tensor(0.5).log().item())
    assert entropies[0] == pytest.approx(torch.tensor(2.0).log().item() * 1.5)
    (token,) = drawn_by(chances.log()[None], torch.tensor([1 - 2**-53], dtype=torch.float64))[0]
    assert token == 4
