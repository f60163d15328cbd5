"""Adapters with an invocation are served: the base's own blocks come first, they act behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import veneer
from support.closeness import assert_no_further
from support.serving_bases import base_of, generated, write_adapter
from support.tiny_models import tiny
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.serve.engine import engine as engines
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.prefix import block_hashes
from veneer.serve.engine.request import Answer, EngineConfig, Request

INVOCATION, OTHER = (7, 5), (9,)
CONTEXT = tuple(20 + n % 60 for n in range(37))  # two blocks and some
PROMPT = (*CONTEXT, *INVOCATION, 11, 12)
CONFIG = EngineConfig(slots=4, chunk=16)
RUNNERS: dict[str, Any] = {
    "compiled": None,
    "general": lambda model, slots, context: (GeneralRunner(model, slots), ()),
    "slots": lambda model, slots, context: (SlotRunner(model, slots, context), ()),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    home, options = tmp_path_factory.mktemp("adapters"), {"rank": 3, "targets": "all"}
    made = {
        "activated": {"invocation": INVOCATION},
        "other": {"invocation": OTHER},
        "same": {"invocation": INVOCATION},
        "plain": {},
    }
    return {
        name: write_adapter(home / name, "llama", seed=seed, **options, **own)
        for seed, (name, own) in enumerate(made.items())
    }


@pytest.fixture
def engine(homes):
    with Engine(base_of(), Library(homes), CONFIG) as engine:
        yield engine


def ask(engine: Engine, tokens: tuple[int, ...], which: Any = None, **options: Any) -> Answer:
    request = Request(tokens, which, Sampling(max_new_tokens=4), logprobs=2, **options)
    answer = engine.submit(request).result()
    assert answer.error is None
    return answer


@pytest.mark.parametrize(
    "runner", ["compiled", "general", pytest.param("slots", marks=pytest.mark.slow)]
)
def test_answers_are_the_models_own(runner, homes, monkeypatch):
    if RUNNERS[runner] is not None:
        monkeypatch.setattr(engines, "runner_for", RUNNERS[runner])
    requests: list[tuple[tuple[int, ...], str | None]] = [
        ((*INVOCATION, *PROMPT), "activated"),
        ((*INVOCATION, *PROMPT), None),
        (CONTEXT, "activated"),
        ((*PROMPT[:40], *OTHER), "other"),
    ]
    with Engine(base_of(), Library(homes), replace(CONFIG, slots=8)) as engine:
        alone = [ask(engine, *request) for request in requests]
        streams = [
            engine.submit(Request(tokens, which, Sampling(max_new_tokens=4), logprobs=2))
            for tokens, which in requests
        ]
        for (tokens, which), own, stream in zip(requests, alone, streams, strict=True):
            ids = [token.id for token in own.tokens]
            together = stream.result()
            assert [token.id for token in together.tokens] == ids
            if runner == "compiled":
                assert together.tokens == own.tokens  # with equal log probabilities
            model = tiny("llama")
            if which is not None:
                veneer.load(model, homes[which])
            assert generated(model, [tokens], 4) == [ids], (tokens, which)


def test_the_base_s_blocks_serve_it_up_to_its_invocation(engine):
    first = ask(engine, CONTEXT)
    assert first.cached_tokens == 0
    ours = ask(engine, PROMPT, "activated")
    assert ours.cached_tokens == 32  # two blocks; the third has the invocation
    assert ask(engine, PROMPT, "same").cached_tokens == 32
    assert ask(engine, PROMPT, "other").cached_tokens == 32  # which has no invocation here
    assert ask(engine, PROMPT, "plain").cached_tokens == 0
    longer = (*PROMPT, *range(30, 50))
    assert ask(engine, longer, "activated").cached_tokens == 32
    assert ask(engine, (*longer, 3), "activated").cached_tokens == 48  # its own third
    assert ask(engine, longer).cached_tokens == 32  # the base's is another
    assert ask(engine, (*longer, 3)).cached_tokens == 48


def test_the_adapter_s_blocks_serve_the_base(homes):
    with Engine(base_of(), Library(homes), CONFIG) as engine:
        expected = ask(engine, PROMPT)
    with Engine(base_of(), Library(homes), CONFIG) as engine:
        ask(engine, PROMPT, "activated")
        again = ask(engine, PROMPT)
    assert again.cached_tokens == 32
    assert again.tokens == expected.tokens  # to the bit


@pytest.mark.parametrize("places", [(16,), (0,), (3, 20), (31,)])
def test_wherever_the_invocation_is_a_cached_answer_is_the_same(places, engine, homes):
    tokens = [*CONTEXT]
    for place in places:
        tokens[place : place + 2] = INVOCATION
    asked = tuple(tokens)
    ask(engine, asked)
    first, second = ask(engine, asked, "activated"), ask(engine, asked, "activated")
    assert first.cached_tokens == places[-1] // 16 * 16
    assert second.cached_tokens == 32
    with Engine(base_of(), Library(homes), replace(CONFIG, cache_bytes=0)) as other:
        uncached = ask(other, asked, "activated")
    assert first.tokens == second.tokens == uncached.tokens


def test_a_later_occurrence_makes_other_blocks():
    size, tokens = 4, tuple(range(20))
    early, late = (block_hashes(tokens, "adapter", size, start) for start in (5, 14))
    base, whole = block_hashes(tokens, "", size), block_hashes(tokens, "adapter", size)
    assert early[0] == late[0] == base[0]
    assert late[:3] == base[:3]
    assert len({*early[1:], *late[3:], *base, *whole}) == 3 + 1 + 4 + 4
    assert block_hashes(tokens, "adapter", size, float("inf")) == base
    assert block_hashes(tokens, "adapter", size, 6)[1] != early[1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_its_embeddings_are_what_the_decoder_gives(pooling, engine, homes):
    answer = engine.submit(Request(PROMPT, "activated", embedding=pooling)).result()
    model = veneer.load(tiny("llama"), homes["activated"])

    def embedding(model):
        with torch.no_grad():
            hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
        return F.normalize(hidden.mean(0) if pooling == "mean" else hidden[-1], dim=0)

    own = embedding(model)
    assert_no_further(torch.tensor(answer.embedding), own, embedding(model.double()))


def test_scores_are_the_models_own(engine, homes):
    model = veneer.load(tiny("llama"), homes["activated"])
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logs = model(tokens).logits[0, :-1].log_softmax(-1)
    own = logs.gather(1, tokens[0, 1:, None])[:, 0]
    scores = engine.score(PROMPT, "activated")
    torch.testing.assert_close(torch.tensor(scores[1:]), own)


def test_mixes_need_one_invocation(engine):
    answer = engine.submit(Request(PROMPT, {"activated": 0.5, "plain": 1.0})).result()
    assert isinstance(answer.error, veneer.AdapterError)
    assert "do not act from the same invocation on" in str(answer.error)
    mixed = ask(engine, PROMPT, {"activated": 0.5, "same": -0.7})
    ask(engine, CONTEXT)
    assert ask(engine, PROMPT, {"activated": 0.5, "same": -0.7}).tokens == mixed.tokens
    assert ask(engine, PROMPT, {"activated": 1.0}).tokens == ask(engine, PROMPT, "activated").tokens
