"""Every kind of adapter is served: each row of a batch as its adapter alone, in any company."""

import weakref
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.own_rows import KINDS, VIRTUAL, installed, write_every_kind
from support.random_adapters import NEW_TOKENS, ids, tokenizer
from support.recorders import StandIn
from support.server import scripted
from support.serving_bases import PROMPT, base_of, generated
from support.tiny_models import VOCAB, tiny
from veneer.adapter.own_rows import joined
from veneer.errors import AdapterError, ContextExceeded, RequestError
from veneer.formats.capture import capture
from veneer.generate.runners.adapter_rows import shared_by_all
from veneer.generate.runners.compiled import CompiledRunner
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.kernels import native
from veneer.kernels.graphs import Graphs
from veneer.serve.engine.adapter_cache import AdapterCache
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Adjustments, EngineConfig, Grammar, Request
from veneer.serve.engine.vocabulary import Vocabularies

ROWS = (None, *KINDS)
SMALL = EngineConfig(slots=len(ROWS), chunk=16)
GREEDY = Sampling(max_new_tokens=8)
DRAWN = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
RUNNERS: dict[str, Any] = {
    "compiled": CompiledRunner,
    "general": lambda model, slots, context: GeneralRunner(model, slots),
    "slots": lambda *args: SlotRunner(*args, Graphs(StandIn())),
}
needs_compiler = pytest.mark.skipif(native.library_of("decode")[0] is None, reason="no C++")


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    return write_every_kind(tmp_path_factory.mktemp("every"))


def request(which: Any, tail: int = 0, **options: Any) -> Request:
    return Request((*PROMPT, 5 + tail), which, **{"sampling": GREEDY, **options})


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((architecture, "compiled") for architecture in ("llama", "gpt2")),
        *(
            pytest.param(architecture, "compiled", marks=pytest.mark.slow)
            for architecture in ("gemma", "mistral", "qwen3", "minigpt", "falcon", "phi3", "qwen2")
        ),
        ("llama", "general"),
        ("gemma2", "slots"),  # which caps logits, -∞ too
        *(
            pytest.param(architecture, kind, marks=pytest.mark.slow)
            for architecture, kind in product(("qwen3", "mistral", "gemma2"), ("general", "slots"))
            if (architecture, kind) != ("gemma2", "slots")
        ),
    ],
)
def test_each_row_is_what_the_model_gives_with_that_adapter(architecture, kind, homes, tmp_path):
    if architecture != "llama":
        homes = write_every_kind(tmp_path, architecture, start=VOCAB - 2)
    base = base_of(architecture)
    if architecture != "llama":
        base = replace(base, tokenizer=tokenizer(VOCAB - 2))
    library = Library(homes)
    cache = AdapterCache(base.model, 2**30, base.tokenizer)
    vocabularies = Vocabularies(cache.fit, base.tokenizer)
    runner = RUNNERS[kind](base.model, len(ROWS), 64)
    tokens, chunks = ids(len(ROWS), 19), []
    for slot, (row, name) in enumerate(zip(tokens.tolist(), ROWS, strict=True)):
        mix = () if name is None else ((library.info(name), 1.0),)
        own = cache.get(mix) if mix else None
        if name == "tokens":
            row[3], row[9] = (VOCAB - 2 * (architecture != "llama") + n for n in (0, 2))
        virtual = vocabularies.of(mix).virtual_ids
        start = 0
        if own is not None and own.prefix is not None:
            runner.begin(slot, own.prefix)
            start = len(virtual)
        chunks.append(Chunk(slot, (*virtual, *row)[start:], start, own, logits=19))
    read = runner.step(chunks).split(19)
    # And a token that each decodes beside the others.
    if isinstance(runner, SlotRunner):
        runner.take(range(len(ROWS)), torch.full((len(ROWS),), 7))
    ends = [chunk.start + len(chunk.tokens) for chunk in chunks]
    newest = runner.step(
        [
            replace(chunk, tokens=(7,), start=end, logits=1, decoding=True)
            for chunk, end in zip(chunks, ends, strict=True)
        ]
    )
    for name, chunk, *ours in zip(ROWS, chunks, read, newest.split(1), strict=True):
        logits = joined(ours)
        model = installed(replace(base, model=tiny(architecture)), homes.get(name))
        text = torch.tensor([[*chunk.tokens[-19:], 7]])
        with torch.no_grad():
            own = model(text, use_cache=False).logits[0]
            reference = model.double()(text, use_cache=False).logits[0]
        size = own.shape[-1]
        assert logits[:, size:].eq(-torch.inf).all()
        assert_no_further(logits[:, :size], own, reference, str(name))


@needs_compiler
def test_blocks_that_hold_a_part_of_a_prefix_are_not_taken(homes):
    """Of the short prompt one block is kept: the first 16 of the prefix's 20 virtual tokens."""
    with Engine(base_of(), Library(homes), SMALL) as engine:
        engine.submit(Request(PROMPT[:3], "prefix", sampling=GREEDY)).result()
        behind = engine.submit(request("prefix", logprobs=3)).result()
    with Engine(base_of(), Library(homes), replace(SMALL, cache_bytes=0)) as engine:
        assert behind.tokens == engine.submit(request("prefix", logprobs=3)).result().tokens


@needs_compiler
def test_together_is_to_the_bit_as_alone(homes):
    """All in one batch, twice, then behind cached prefixes: tokens and log probabilities."""
    requests = [
        request(which, tail, sampling=sampling, logprobs=3)
        for tail, sampling in enumerate((GREEDY, DRAWN))
        for which in ROWS
    ]
    with Engine(base_of(), Library(homes), SMALL) as engine:
        assert isinstance(engine.runner, CompiledRunner)
        for cached in (False, True):
            streams = [engine.submit(each) for each in requests]
            together = [stream.result() for stream in streams]
            if not cached:
                first = together
        # Two blocks, or what virtual tokens leave of them.
        assert {answer.cached_tokens for answer in together} == {16, 32 - VIRTUAL}
    with Engine(base_of(), Library(homes), replace(SMALL, cache_bytes=0)) as engine:
        alone = [engine.submit(each).result().tokens for each in requests]
    with Engine(base_of(), config=SMALL) as engine:
        assert engine.submit(requests[0]).result().tokens == alone[0]
    for each, own, *others in zip(requests, alone, first, together, strict=True):
        assert [other.tokens for other in others] == [own, own], each.adapter
    assert len({str(tokens) for tokens in alone[: len(ROWS)]}) == len(ROWS)


@pytest.mark.parametrize("kind", [pytest.param("general", marks=pytest.mark.slow), "slots"])
def test_answers_equal_generate_with_that_adapter(homes, kind, monkeypatch):
    monkeypatch.setattr(
        "veneer.serve.engine.engine.runner_for", lambda *args: (RUNNERS[kind](*args), ())
    )
    with Engine(base_of(), Library(homes), SMALL) as engine:
        short = replace(GREEDY, max_new_tokens=3)
        streams = [engine.submit(request(which, sampling=short)) for which in ROWS]
        answers = [[token.id for token in stream.result().tokens] for stream in streams]
        assert kind != "slots" or engine.runner.graphs.why_not is None
    for which, answer in zip(ROWS, answers, strict=True):
        model = installed(base_of(), homes.get(which))
        assert [answer] == generated(model, [(*PROMPT, 5)], 3), which


NEW = NEW_TOKENS[0]


def test_new_tokens_are_read_and_written(homes):
    """In prompts and answers, log probabilities, penalties, biases, stop texts and grammars."""
    token = VOCAB  # NEW, which only this adapter has
    with Engine(base_of(), Library(homes), SMALL) as engine:
        own = engine.vocabulary("tokens")
        assert own.size == VOCAB + len(NEW_TOKENS)
        assert own.tokenizer(f"a {NEW} b")["input_ids"] == [68, 3, token, 3, 69]
        assert engine.vocabulary(None).tokenizer is engine.tokenizer
        assert engine.vocabulary("prefix").grammars is engine.vocabulary(None).grammars
        engine.library.add("again", homes["tokens"])
        assert engine.vocabulary("again") is own
        assert len(engine.tokenizer) == VOCAB

        def asked(which: Any = "tokens", **options: Any) -> Any:
            return engine.submit(request(which, **options)).result()

        biased = Adjustments(logit_bias=((token, 100.0),))
        answer = asked(adjustments=biased, logprobs=20)
        assert [each.id for each in answer.tokens] == [token] * 8
        assert answer.text == NEW * 8
        assert all(len(each.top) == 20 for each in answer.tokens)
        penalized = replace(biased, frequency_penalty=60.0)
        assert [each.id for each in asked(adjustments=penalized).tokens[:3]].count(token) == 2
        assert asked(adjustments=biased, stop=(NEW * 2,)).text == ""
        choice = Grammar("regex", f"({NEW}|{NEW_TOKENS[1]}){{2}}")
        assert asked(grammar=choice, adjustments=biased).text == NEW * 2
        scores = engine.score((*PROMPT, token, 5), "tokens")
        assert (scores[0], len(scores)) == (None, len(PROMPT) + 2)
        for which in (None, "dora"):
            with pytest.raises(RequestError, match=f"{token} is no token"):
                asked(which, adjustments=biased)
            assert token not in {
                t for each in asked(which, logprobs=20).tokens for t, _ in each.top
            }
            drawn = asked(which, sampling=replace(DRAWN, temperature=1e4, max_new_tokens=30))
            assert all(each.id < VOCAB for each in drawn.tokens)
        # Whoever has begun goes on with the tokens that the name meant then.
        served = scripted()
        served.engine, served.library = engine, engine.library
        which = served.which("again", None)
        engine.library.add("again", homes["dora"])
        engine.load("again")
        tokens = served.encode(f"a {NEW}", special=False, which=which)
        assert tokens[-1] == token
        (stream,) = served.submit([Request(tuple(tokens), which, sampling=GREEDY)])
        assert stream.result().reason == "length"
        assert token not in served.encode(NEW, special=False, which=served.which("again", None))
        engine.library.add("again", homes["tokens"])
        assert engine.vocabulary("again") is own
        # It leaves memory with the adapters that had it, as they do.
        left = weakref.ref(own)
        del own
        for name in ("tokens", "again"):
            assert left() is not None
            engine.library.remove(name)
            engine.load("dora")
        assert left() is None


@pytest.mark.parametrize("kind", ["compiled", "general"])
def test_scores_and_embeddings_behind_virtual_tokens(kind, homes, monkeypatch):
    if kind == "general":
        monkeypatch.setattr(
            "veneer.serve.engine.engine.runner_for", lambda *args: (RUNNERS[kind](*args), ())
        )
    with Engine(base_of(), Library(homes), SMALL) as engine:
        for which in ("tokens", "prompt", "prefix"):
            model = installed(base_of(), homes[which])
            text = torch.tensor([PROMPT])
            with torch.no_grad():
                logs = model(text, use_cache=False).logits[0, :-1].log_softmax(-1)
                hidden = model.model(text, use_cache=False).last_hidden_state[0]
            expected = logs.gather(1, text[0, 1:, None])[:, 0]
            scores = engine.score(PROMPT, which)
            assert scores[0] is None
            torch.testing.assert_close(torch.tensor(scores[1:]), expected, rtol=1e-4, atol=1e-4)
            asked = Request(PROMPT, which, embedding="mean")
            vector = torch.tensor(engine.submit(asked).result().embedding)
            mean = torch.nn.functional.normalize(hidden.sum(0), dim=0)
            torch.testing.assert_close(vector, mean, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_take_some_of_the_context(homes):
    with Engine(base_of(), Library(homes), replace(SMALL, context=48)) as engine:
        for which in ("prompt", "prefix"):
            asked = Request((5,) * 20, which, replace(GREEDY, max_new_tokens=99))
            answer = engine.submit(asked).result()
            assert (answer.prompt_tokens, answer.new_tokens) == (20, 8)
            with pytest.raises(ContextExceeded, match="the context of 28"):
                engine.submit(Request((5,) * 28, which))
    with Engine(base_of(), Library(homes), replace(SMALL, context=VIRTUAL)) as engine:
        refused = engine.refuse_unservable()
        assert {*refused} == {"prompt", "prefix"}
        assert f"its {VIRTUAL} virtual tokens fill the context of {VIRTUAL}" in refused["prefix"]


def test_what_can_be_mixed(homes):
    with Engine(base_of(), Library(homes), SMALL) as engine:
        mixed = engine.submit(request({"tokens": 0.5, "dora": 0.5})).result()
        assert mixed.reason == "length"
        for mix, why in (
            ({"prefix": 1.0, "dora": 0.5}, "has virtual tokens, which act alone"),
            ({"rows": 0.5}, "replaces weights of the base"),
        ):
            error = engine.submit(request(mix)).result().error
            assert isinstance(error, AdapterError)
            assert why in str(error)
        # Nobody's mix takes an adapter from those who ask for it alone.
        assert engine.library.names() == tuple(sorted(KINDS))


def test_of_biases_those_of_linear_layers_differ_from_row_to_row():
    model = tiny("gpt2")
    layer = "transformer.h.0"
    names = [f"{layer}.attn.c_attn.bias", f"{layer}.ln_1.bias", f"{layer}.mlp.c_proj.bias"]
    saved = {name: model.get_parameter(name).detach() for name in names}
    state = capture(veneer.attach(tiny("gpt2"), veneer.LoRA(rank=2, targets="attention")))
    assert shared_by_all(model, replace(state, modules_to_save=saved)) == [names[1]]


def test_a_token_of_a_row_that_ended_is_nothing_to_other_adapters(homes):
    """Rows that sit out a step of slots go through the model too, where it may lack their token."""
    model, library = base_of().model, Library(homes)
    cache, runner = AdapterCache(model, 2**30, tokenizer()), RUNNERS["slots"](model, 2, 64)
    for slot, name in ((0, "tokens"), (1, "dora"), (1, "embedding")):
        chunk = Chunk(slot, PROMPT, 0, cache.get(((library.info(name), 1.0),)), 1)
        runner.step([chunk])
        runner.take([slot], torch.tensor([VOCAB if name == "tokens" else 5]))
        logits = runner.step([replace(chunk, tokens=(-1,), start=len(PROMPT), decoding=True)])
        assert logits[:, :VOCAB].isfinite().all()
        runner.free(slot)
