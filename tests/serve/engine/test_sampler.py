"""What a request may change of the logits, by vLLM's formulas."""

import pytest
import torch

from support.serving_bases import PROMPT, base_of, write_adapters
from veneer.errors import RequestError
from veneer.generate.sampling import Sampling
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Adjustments, EngineConfig, Request
from veneer.serve.engine.sampler import Sampler, chances_of, sample

SMALL = EngineConfig(slots=4, chunk=16)
DRAWN = Sampling(max_new_tokens=12, temperature=0.8, seed=5)
ALL = Adjustments(0.5, -0.7, 1.3, ((7, 4.0), (9, -50.0)), 0.02)
CASES = {
    "frequency": Adjustments(frequency_penalty=1.5),
    "presence": Adjustments(presence_penalty=2.0),
    "repetition": Adjustments(repetition_penalty=0.6),
    "bias": Adjustments(logit_bias=((3, 2.5), (95, -100.0))),
    "all": ALL,
}


def by_vllm(scores, prompt, answer, adjustments):
    """Bias, then repetition, then frequency and presence: vLLM's order and formulas."""
    scores = scores.clone()
    for token, bias in adjustments.logit_bias:
        scores[token] += bias
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(scores)).double()
    for token in {*prompt, *answer}:
        penalty = adjustments.repetition_penalty
        scores[token] *= 1 / penalty if scores[token] > 0 else penalty
    scores -= adjustments.frequency_penalty * counts
    return scores - adjustments.presence_penalty * (counts > 0).double()


@pytest.mark.parametrize("case", CASES)
def test_logits_change_as_vllm_changes_them(case):
    scores = 3 * torch.randn(96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = scores.clone()
    request = Request((4, 5, 5, 6), adjustments=CASES[case])
    sampler, answer = Sampler.of(request, scores.device), []
    for token in (5, 80, 80, 80, 3, 4):
        expected = by_vllm(scores, request.tokens, answer, request.adjustments)
        assert torch.allclose(sampler.adjusted(scores), expected, rtol=1e-12, atol=1e-12)
        sampler.note(torch.tensor([token]))
        answer.append(token)
    assert torch.equal(scores, before)


def test_nothing_is_computed_for_rows_that_ask_for_nothing():
    scores = torch.randn(96)
    sampler = Sampler.of(Request((4,), sampling=DRAWN), scores.device)
    assert sampler.adjusted(scores) is scores
    assert sampler.accept(4) is False
    assert sampler._history is None


@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_min_p_then_top_k_then_top_p(min_p, top_k, top_p):
    scores = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, seed=0)
    request = Request((4,), sampling=sampling, adjustments=Adjustments(min_p=min_p))
    chances, tokens = chances_of(scores, Sampler.of(request, scores.device))
    drawn = torch.zeros_like(scores)
    drawn[slice(None) if tokens is None else tokens] = chances / chances.sum()

    expected = scores / 0.7
    share = expected.softmax(-1)
    expected[share < min_p * share.max()] = -torch.inf
    if top_k:
        expected[expected < expected.sort(descending=True).values[top_k - 1]] = -torch.inf
    ascending, order = expected.sort()
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    cut[-1] = False
    if top_p < 1:
        expected[order[cut]] = -torch.inf
    assert torch.allclose(drawn, expected.softmax(-1), rtol=1e-9, atol=1e-12)


def test_a_greedy_answer_is_that_of_transformers_with_the_same_penalty():
    base = base_of()
    tokens = torch.tensor([PROMPT])
    expected = base.model.generate(
        tokens, max_new_tokens=12, do_sample=False, repetition_penalty=1.7, pad_token_id=0
    )
    request = Request(
        PROMPT,
        sampling=Sampling(max_new_tokens=12),
        adjustments=Adjustments(repetition_penalty=1.7),
    )
    with Engine(base, config=SMALL) as engine:
        answer = engine.submit(request).result()
    assert [token.id for token in answer.tokens] == expected[0, len(PROMPT) :].tolist()


def test_rows_with_penalties_change_no_other_and_are_changed_by_none(tmp_path):
    requests = [
        Request((*PROMPT, n), which, sampling, adjustments=adjustments, logprobs=2)
        for which in (None, "plain")
        for n, adjustments in ((5, Adjustments()), (6, ALL), (7, CASES["frequency"]))
        for sampling in (Sampling(max_new_tokens=12), DRAWN)
    ]
    with Engine(base_of(), Library(write_adapters(tmp_path)), SMALL) as engine:
        together = [stream.result() for stream in map(engine.submit, requests)]
        alone = [engine.submit(request).result() for request in requests]
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        plain = [engine.submit(Request(r.tokens, r.adapter, r.sampling)).result() for r in requests]
        with pytest.raises(RequestError, match="96 is no token"):
            engine.submit(Request(PROMPT, adjustments=Adjustments(logit_bias=((96, 1.0),))))
    changed = [
        [token.id for token in one.tokens] != [token.id for token in other.tokens]
        for one, other in zip(together, plain, strict=True)
    ]
    assert any(changed)
    for request, is_other in zip(requests, changed, strict=True):
        assert request.adjustments.of_logits or not is_other


def test_what_fails_in_one_row_fails_in_no_other():
    scores = torch.zeros(2, 96)
    scores[0] = torch.nan
    samplers = [Sampler.of(Request((4,), sampling=DRAWN), scores.device) for _ in range(2)]
    first, second = sample(scores, samplers)
    assert isinstance(first, RuntimeError)
    assert not isinstance(second, Exception)
