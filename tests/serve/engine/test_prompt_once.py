"""What requests share of a prompt, and what is asked of a prompt alone."""

import pytest
import torch
from torch.nn import functional as F

import veneer
from support.closeness import assert_no_further
from support.serving_bases import PROMPT, base_of, write_adapters
from support.tiny_models import tiny
from veneer.errors import RequestError
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.serve.engine import engine as engines
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig, Request

RUNNERS = {
    "compiled": None,
    "general": lambda model, slots, context: (GeneralRunner(model, slots), ()),
    "slots": lambda model, slots, context: (SlotRunner(model, slots, context), ()),
}
LONG = tuple(3 + n % 90 for n in range(45))  # two chunks and some


@pytest.fixture(params=RUNNERS)
def runner(request, monkeypatch):
    if RUNNERS[request.param] is not None:
        monkeypatch.setattr(engines, "runner_for", RUNNERS[request.param])
    return request.param


def test_one_prompt_is_computed_once_for_all_that_ask_it(runner, tmp_path):
    names = ("plain", "wide")
    directories = write_adapters(tmp_path)
    library = Library({name: directories[name] for name in names})
    requests = [
        Request(LONG, which, Sampling(max_new_tokens=8, temperature=1.0, seed=n), logprobs=1)
        for which in (None, *names)
        for n in range(3)
    ]
    config = EngineConfig(slots=9, chunk=16, cache_bytes=0)
    with Engine(base_of(), library, config) as engine:
        for name in names:
            engine.load(name)
        alone = [engine.submit(request).result().tokens for request in requests]
        before = engine.stats.prompt_tokens
        with engine._changed:  # so that the engine sees them all at once
            streams = [engine.submit(request) for request in requests]
        together = [stream.result() for stream in streams]
        assert engine.stats.prompt_tokens - before == 3 * len(LONG)
    if runner == "compiled":  # to the bit, log probabilities too
        assert [answer.tokens for answer in together] == alone
    ids = [[token.id for token in answer.tokens] for answer in together]
    assert ids == [[token.id for token in tokens] for tokens in alone]
    assert sorted(answer.cached_tokens for answer in together) == [0] * 3 + [len(LONG)] * 6


def test_rows_whose_twin_goes_away_compute_the_prompt_themselves():
    config = EngineConfig(slots=3, chunk=16, cache_bytes=0)
    request = Request(LONG, sampling=Sampling(max_new_tokens=4))
    with Engine(base_of(), config=config) as engine:
        expected = engine.submit(request).result().tokens
        with engine._changed:
            streams = [engine.submit(request) for _ in range(3)]
            streams[0].cancel()
        first, *others = [stream.result() for stream in streams]
        assert first.reason == "cancelled"
        assert [answer.tokens for answer in others] == [expected] * 2


@pytest.mark.parametrize(
    ("which", "kind"),
    [(None, "compiled"), ("plain", "compiled"), ("dora", "compiled"), ("dora", "general")],
)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.thinned
def test_embeddings_are_what_the_decoder_gives(pooling, which, kind, tmp_path, monkeypatch):
    if RUNNERS[kind] is not None:
        monkeypatch.setattr(engines, "runner_for", RUNNERS[kind])
    homes = write_adapters(tmp_path)
    with Engine(base_of(), Library(homes), EngineConfig(slots=4, chunk=16)) as engine:
        answering = engine.submit(Request(PROMPT, "plain", Sampling(max_new_tokens=12)))
        answer = engine.submit(Request(LONG, which, embedding=pooling)).result()
        again = engine.submit(Request(LONG, which, embedding=pooling)).result()
        answering.result()
    assert answer.embedding == again.embedding
    assert (answer.text, answer.new_tokens, answer.prompt_tokens) == ("", 0, len(LONG))
    model = tiny("llama")
    if which is not None:
        veneer.load(model, homes[which])

    def embedding(model):
        with torch.no_grad():
            hidden = model.model(torch.tensor([LONG])).last_hidden_state[0]
        return F.normalize(hidden.mean(0) if pooling == "mean" else hidden[-1], dim=0)

    own = embedding(model)
    assert_no_further(torch.tensor(answer.embedding), own, embedding(model.double()))


def test_a_text_that_fills_the_context_has_an_embedding():
    with Engine(base_of(), config=EngineConfig(chunk=16)) as engine:
        assert engine.submit(Request((5,) * 64, embedding="mean")).result().embedding
        with pytest.raises(RequestError, match="65 tokens, which is more than the context of 64"):
            engine.submit(Request((5,) * 65, embedding="mean"))
