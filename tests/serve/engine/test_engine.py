"""The engine: each answer is what its request alone would get, whatever else is asked."""

import asyncio
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import veneer
from support.closeness import assert_no_further
from support.random_adapters import distance
from support.serving_bases import PROMPT, base_of, generated, hold, write_adapter, write_adapters
from support.tiny_models import tiny
from veneer.errors import AdapterError, ConfigError, QueueFull, RequestError
from veneer.formats.adapters import write
from veneer.formats.capture import capture
from veneer.generate.runners.compiled import CompiledRunner
from veneer.generate.runners.layer_table import Unsuited
from veneer.generate.sampling import Sampling
from veneer.kernels import native
from veneer.models.load import load_base
from veneer.serve.engine.adapter_cache import AdapterCache
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Answer, EngineConfig, Request

GREEDY = Sampling(max_new_tokens=12)
SMALL = EngineConfig(slots=4, chunk=16)


@pytest.fixture
def homes(tmp_path):
    return write_adapters(tmp_path)


def answered(engine: Engine, request: Request) -> list[int]:
    return ids_of(engine.submit(request).result())


def ids_of(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def request(seed: int, which: Any = None, **options: Any) -> Request:
    """Return a request whose first tokens are those of all the others."""
    own = torch.randint(3, 90, (seed % 7 + 1,), generator=torch.Generator().manual_seed(seed))
    return Request((*PROMPT, *own.tolist()), which, **{"sampling": GREEDY, **options})


HAS_COMPILER = native.library_of("decode")[0] is not None
COMPILED = [(name, True) for name in ("llama", "mistral", "minigpt", "gpt2", "gemma")]
GENERAL = [(name, False) for name in ("minigpt", "gpt2", "falcon", "qwen3")]


@pytest.fixture
def runner_kind(compiled, monkeypatch):
    """Let engines compute by the compiled step, or each by its model's own forward."""

    def refuse(*_: Any) -> None:
        raise Unsuited("a test asks for the other runner")

    if not compiled:
        monkeypatch.setattr("veneer.generate.runners.choice.CompiledRunner", refuse)


@pytest.mark.usefixtures("runner_kind")
@pytest.mark.parametrize(("architecture", "compiled"), [*COMPILED, *GENERAL])
@pytest.mark.thinned(one_in=2)
def test_answers_together_equal_generate_alone(architecture, compiled, tmp_path):
    homes = write_adapters(tmp_path, architecture) if architecture != "falcon" else {}
    requests = [request(n, which) for n, which in enumerate([None, *homes, None, *homes])]
    with Engine(base_of(architecture), Library(homes), SMALL) as engine:
        assert isinstance(engine.runner, CompiledRunner) == (compiled and HAS_COMPILER)
        streams = [engine.submit(each) for each in requests]
        answers = [ids_of(stream.result()) for stream in streams]
        assert engine.stats.requests == len(requests)
    model = base_of(architecture).model
    for name, home in homes.items():
        veneer.load(model, home, name=name)
    for each, answer in zip(requests, answers, strict=True):
        veneer.use(model, each.adapter)
        assert [answer] == generated(model, [each.tokens], 12), each.adapter


@pytest.mark.usefixtures("runner_kind")
@pytest.mark.parametrize(
    ("architecture", "compiled", "each_asks"),
    [("llama", True, 6), ("llama", True, 25), ("minigpt", False, 4)],
)
@pytest.mark.thinned(one_in=2)
def test_eight_threads_with_a_reload_in_the_middle(architecture, compiled, each_asks, tmp_path):
    """Greedy requests over the base and three adapters: each equals its solo run."""
    homes = write_adapters(tmp_path, architecture)
    del homes["pissa"]
    names = [None, *homes]
    other = write_adapter(tmp_path / "other", architecture, seed=9, rank=3)
    library = Library(homes)
    answers: dict[tuple[int, int], tuple[Request, int, list[int]]] = {}
    half = threading.Barrier(9)

    with Engine(base_of(architecture), library, SMALL) as engine:

        def ask(thread: int) -> None:
            for n in range(each_asks):
                if n in (each_asks // 2, each_asks - 1):
                    half.wait()  # some answers run on while the name gets another adapter
                each = request(thread * each_asks + n, names[(thread + n) % 4])
                # Nobody else changes the name between these two lines but the reload below.
                with changing:
                    version = library.info("plain").version
                    stream = engine.submit(each)
                answers[thread, n] = each, version, ids_of(stream.result())

        changing = threading.Lock()
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        half.wait()
        with changing:
            first = library.info("plain").version
            library.add("plain", other)
        half.wait()
        for thread in threads:
            thread.join()
        stats = engine.stats
    assert len(answers) == 8 * each_asks
    assert stats.new_tokens == len(answers) * 12
    assert stats.cached_tokens > 0
    assert stats.steps < len(answers) * 12  # they were answered together
    assert {version for each, version, _ in answers.values() if each.adapter == "plain"} > {first}

    homes["reloaded"] = other
    alike: dict[tuple[Any, int], list[tuple[tuple[int, ...], list[int]]]] = {}
    with Engine(base_of(architecture), Library(homes), SMALL) as alone:
        for each, version, answer in answers.values():
            is_new = each.adapter == "plain" and version != first
            name = "reloaded" if is_new else each.adapter
            assert answer == answered(alone, Request(each.tokens, name, GREEDY))
            alike.setdefault((name, len(each.tokens)), []).append((each.tokens, answer))
    model = base_of(architecture).model
    for name, home in homes.items():
        veneer.load(model, home, name=name)
    for (name, _), rows in alike.items():
        veneer.use(model, name)
        expected = generated(model, [tokens for tokens, _ in rows], 12)
        assert [answer for _, answer in rows] == expected, name


def test_text_equals_that_of_answers(minigpt_home):
    """On a model that speaks, with its own end of text, through its own chat template."""
    base = load_base(minigpt_home, dtype="float32")
    questions = ["What do you cook with leeks?", "How are you?", "Tell me of the sea."]
    sampling = Sampling(max_new_tokens=40)
    expected = veneer.answers(base.model, base.tokenizer, questions, sampling=sampling, batch=1)
    with Engine(base, config=SMALL) as engine:
        prompts = [
            base.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for question in questions
        ]
        streams = [engine.submit(Request(tuple(prompt), None, sampling)) for prompt in prompts]
        answers = [stream.result() for stream in streams]
    assert [answer.text for answer in answers] == expected
    assert {answer.reason for answer in answers} <= {"stop", "length"}


def test_draws_are_the_rows_own(homes):
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9, top_k=40, seed=7)
    with Engine(base_of(), Library(homes), SMALL) as engine:
        alone = answered(engine, request(1, "plain", sampling=sampling))
        streams = [engine.submit(request(n, "plain", sampling=sampling)) for n in range(5)]
        among = [ids_of(stream.result()) for stream in streams]
        assert among[1] == alone
        assert len({tuple(answer) for answer in among}) == 5
        assert answered(engine, request(1, "plain")) != alone


def test_prefixes_are_shared_by_content_alone(homes):
    library = Library({**homes, "twin": homes["plain"]})
    with Engine(base_of(), library, SMALL) as engine:
        expected = answered(engine, request(3, "plain"))
        before = engine.stats.cached_tokens
        # The same adapter under another name shares what was computed; no other does.
        assert answered(engine, request(3, "twin")) == expected
        assert engine.stats.cached_tokens - before == 16
        for which in ("dora", {"plain": 0.5, "dora": 0.5}, None):
            cached = engine.submit(request(3, which)).result().cached_tokens
            assert cached == 0, which
        whole = answered(engine, request(3, {"plain": 1.0}))
        assert whole == expected


def test_a_cached_prefix_changes_nothing(homes):
    with Engine(base_of(), Library(homes), EngineConfig(slots=2, chunk=16)) as engine:
        first = engine.submit(request(4, "dora", logprobs=2)).result()
        again = engine.submit(request(4, "dora", logprobs=2)).result()
    assert (first.cached_tokens, again.cached_tokens) == (0, 16)
    assert first.tokens == again.tokens  # log probabilities too, to the bit
    with Engine(base_of(), Library(homes), EngineConfig(chunk=16, cache_bytes=0)) as engine:
        for _ in range(2):
            assert engine.submit(request(4, "dora")).result().cached_tokens == 0


def test_stop_texts():
    with Engine(base_of(), config=SMALL) as engine:
        text = engine.submit(request(5)).result().text
        assert len(text) == 12
        stop = text[5:8]
        answer = engine.submit(request(5, stop=("never there", stop))).result()
        assert answer.text == text[: text.index(stop)]
        assert answer.reason == "stop"
        pieces = list(engine.submit(request(5, stop=(text[5:8] + "#",))))
        assert "".join(piece.text for piece in pieces) == text
        assert sum(len(piece.tokens) for piece in pieces) == 12
        assert [piece.reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        end = pieces[-1]
        counts = end.prompt_tokens, end.new_tokens, end.cached_tokens
        assert (end.reason, counts) == ("length", (len(request(5).tokens), 12, 16))


def test_logprobs_and_scores_agree_with_the_model(homes):
    each = request(6, "wide", logprobs=3)
    with Engine(base_of(), Library(homes), SMALL) as engine:
        answer = engine.submit(each).result()
        whole = (*each.tokens, *ids_of(answer))
        scores = engine.score(whole, "wide")
        base = engine.score(whole)
    model = base_of().model
    veneer.load(model, homes["wide"])

    def logprobs(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return logs[range(len(whole) - 1), whole[1:]]

    own, reference = logprobs(model), logprobs(model.double())
    assert scores[0] is None
    assert_no_further(torch.tensor(scores[1:]), own, reference)
    assert distance(torch.tensor(base[1:]), reference) > 1e-2  # the adapter makes a difference
    new = len(answer.tokens)
    drawn = torch.tensor([token.logprob for token in answer.tokens])
    assert_no_further(drawn, own[-new:], reference[-new:])
    for token in answer.tokens:
        assert token.top[0] == (token.id, token.logprob)
        assert len(token.top) == 3


def test_cancelling_frees_the_slot(monkeypatch):
    long = Sampling(max_new_tokens=40)
    cancelled = threading.Event()
    with Engine(base_of(), config=EngineConfig(slots=1, chunk=16)) as engine:
        hold(engine, cancelled, monkeypatch)
        stream = engine.submit(request(1, sampling=long))
        waits = engine.submit(request(2))
        stream.next()
        stream.cancel()
        cancelled.set()
        *_, end = stream
        assert end.reason == "cancelled"
        assert len(waits.result().tokens) == 12


def test_waiting_has_an_end(homes, monkeypatch):
    config = EngineConfig(slots=1, queue=2, chunk=16)
    asked = threading.Event()
    with Engine(base_of(), Library(homes), config) as engine:
        hold(engine, asked, monkeypatch)
        streams, refused = [], []
        for n in range(30):
            try:
                streams.append(engine.submit(request(n)))
            except QueueFull as full:
                refused.append(str(full))
        asked.set()
        assert refused
        assert all("wait already" in why for why in refused)
        assert all(len(stream.result().tokens) == 12 for stream in streams)
        assert engine.stats.active == engine.stats.waiting == 0


def test_what_cannot_be_asked(homes):
    with Engine(base_of(), Library(homes), SMALL) as engine:
        for bad, why in (
            (Request(PROMPT, "plane"), "did you mean 'plain'"),
            (Request((5,) * 64), "64 tokens, which leaves no room for an answer in the context"),
            (Request((5, 96)), "96 is no token"),
        ):
            with pytest.raises(RequestError, match=why):
                engine.submit(bad)
        # A prompt that leaves room for less than was asked gets what there is.
        answer = engine.submit(Request((5,) * 60, None, GREEDY)).result()
        assert (len(answer.tokens), answer.reason) == (4, "length")
    for wrong in ({"tokens": ()}, {"stop": ("",)}, {"logprobs": 21}):
        with pytest.raises(RequestError):
            Request(**{"tokens": (1,), **wrong})
    with pytest.raises(ConfigError, match="slots is 0"):
        EngineConfig(slots=0)
    with pytest.raises(ConfigError, match="this model's is 64"):
        Engine(base_of(), config=EngineConfig(context=65))


def test_an_adapter_that_does_not_fit_is_an_error_of_its_requests_alone(homes, tmp_path):
    homes["foreign"] = write_adapter(tmp_path / "foreign", "qwen2", seed=2, rank=2)
    model = tiny("llama")
    veneer.save(veneer.attach(model, veneer.Method("full")), tmp_path / "full")
    homes["full"] = tmp_path / "full"
    state = capture(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)))
    norm = {"model.norm.weight": torch.ones(32)}
    write(replace(state, modules_to_save=norm), tmp_path / "norm")
    homes["norm"] = tmp_path / "norm"
    with Engine(base_of(), Library(homes), SMALL) as engine:
        good = engine.submit(request(1, "plain"))
        for name, why in (
            ("foreign", "another base"),
            ("full", r"replaces weights of the base \(full\)"),
            ("norm", "it has model.norm.weight beside its factors"),
        ):
            end = engine.submit(request(1, name)).result()
            assert end.reason == "error"
            assert re.search(why, str(end.error))
            assert str(homes[name]) in str(end.error)
            with pytest.raises(AdapterError, match=why):
                engine.load(name)
            with pytest.raises(AdapterError, match=why):
                engine.score(PROMPT, name)
        assert len(good.result().tokens) == 12
        assert engine.stats.resident == ("plain",)


def test_a_step_that_fails_ends_its_requests_and_no_others(monkeypatch):
    with Engine(base_of(), config=SMALL) as engine:
        own = engine.runner.step
        monkeypatch.setattr(engine.runner, "step", lambda chunks: 1 / 0)
        end = engine.submit(request(1)).result()
        assert (end.reason, str(end.error)) == ("error", "division by zero")
        monkeypatch.setattr(engine.runner, "step", own)
        assert len(engine.submit(request(1)).result().tokens) == 12
        assert engine.stats.active == 0


def test_memory_for_adapters_has_an_end(homes):
    model = base_of().model
    library, cache = Library(homes), AdapterCache(model, 2**30)
    sizes = {name: cache.get(((library.info(name), 1.0),)).nbytes for name in homes}
    assert cache.nbytes == sum(sizes.values())
    limit = sizes["plain"] + sizes["dora"]
    with Engine(base_of(), library, EngineConfig(chunk=16, adapter_bytes=limit)) as engine:
        for name in ("plain", "wide", "dora", "plain"):
            expected = answered(engine, request(2, name))
            assert engine.stats.resident[-1] == name
            assert engine.stats.resident_bytes <= limit
            assert answered(engine, request(2, name)) == expected
        assert engine.stats.evicted


def test_a_name_may_go_while_its_answers_run(homes):
    library = Library(homes)
    with Engine(base_of(), library, SMALL) as engine:
        expected = answered(engine, request(3, "dora"))
        running = engine.submit(request(3, "dora"))
        library.remove("dora")
        with pytest.raises(RequestError, match="No adapter is called 'dora'"):
            engine.submit(request(3, "dora"))
        assert ids_of(running.result()) == expected
    with pytest.raises(AdapterError, match="no adapter directory"):
        library.add("new", homes["dora"] / "nowhere")


@pytest.mark.parametrize("drain", [True, False])
def test_closing(drain, homes):
    engine = Engine(base_of(), Library(homes), EngineConfig(slots=2, chunk=16))
    streams = [engine.submit(request(n, "plain")) for n in range(6)]
    engine.close(drain=drain)
    reasons = {stream.result().reason for stream in streams}
    assert reasons == {"length"} if drain else "cancelled" in reasons
    with pytest.raises(QueueFull, match="closing"):
        engine.submit(request(1))
    engine.close()


def test_streams_for_asyncio():
    async def ask(engine: Engine, seed: int) -> str:
        stream = engine.submit(request(seed))
        return "".join([piece.text async for piece in stream])

    async def all_of(engine: Engine) -> list[str]:
        return list(await asyncio.gather(*(ask(engine, seed) for seed in range(6))))

    with Engine(base_of(), config=SMALL) as engine:
        texts = asyncio.run(all_of(engine))
        assert texts == [engine.submit(request(seed)).result().text for seed in range(6)]
        with pytest.raises(TimeoutError):
            engine.submit(request(1)).next(timeout=0)
