"""Rows in slots, whose steps ask nothing of a device: here on a CPU, where tokens are numbers."""

from dataclasses import replace
from itertools import count
from threading import current_thread
from typing import Any

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.recorders import StandIn
from support.serving_bases import PROMPT, base_of, generated, write_adapters
from support.tiny_models import tiny
from veneer.generate import slots
from veneer.generate.runners import choice
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.generate.slots import NotInSlots, SlotModel
from veneer.kernels.graphs import Graphs
from veneer.serve.engine import adapter_cache
from veneer.serve.engine import engine as engines
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Adjustments, EngineConfig, Grammar, Request
from veneer.serve.engine.sampler import Sampler, drawn_at_once
from veneer.serve.engine.stream import Stream

GREEDY = Sampling(max_new_tokens=8)
SMALL = EngineConfig(slots=5, chunk=16)
SLOW = ("gpt_oss", "minigpt", "mistral", "gpt2", "gemma3")
SUITED = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture
def in_slots(monkeypatch):
    """Let engines compute in slots, as on a card, and by what plays the part of graphs."""
    runners: list[SlotRunner] = []

    def runner(model: Any, count: int, context: int) -> tuple[SlotRunner, tuple[str, ...]]:
        runners.append(SlotRunner(model, count, context, Graphs(StandIn())))
        return runners[-1], ()

    monkeypatch.setattr(engines, "runner_for", runner)
    return runners


def ids_of(stream: Stream) -> list[int]:
    return [token.id for token in stream.result().tokens]


def asked(number: int, which: Any = None, **options: Any) -> Request:
    own = torch.randint(3, 90, (number % 7 + 1,), generator=torch.Generator().manual_seed(number))
    return Request((*PROMPT, *own.tolist()), which, **{"sampling": GREEDY, **options})


@pytest.mark.parametrize("architecture", SUITED)
def test_answers_together_equal_generate_alone(architecture, in_slots, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "FIRST_PLACES", 16)  # so that rows outgrow them
    homes = {} if architecture == "gpt_oss" else write_adapters(tmp_path, architecture)
    requests = [asked(n, which) for n, which in enumerate([None, *homes, None, *homes])]
    with Engine(base_of(architecture), Library(homes), SMALL) as engine:
        answers = [ids_of(each) for each in [engine.submit(each) for each in requests]]
        assert engine.stats.new_tokens == 8 * len(requests)
        assert engine.stats.cached_tokens > 0
    assert in_slots[0].graphs.why_not is None
    model = base_of(architecture).model
    for name, home in homes.items():
        veneer.load(model, home, name=name)
    for each, answer in zip(requests, answers, strict=True):
        veneer.use(model, each.adapter)
        assert [answer] == generated(model, [each.tokens], 8), each.adapter


def test_logits_are_the_models_own():
    """Of rows of different lengths, one of which sits out, and behind a copied block."""
    model = tiny("llama")
    in_slots = SlotModel(model, 4, 64)
    tokens = torch.randint(3, 90, (3, 20))
    lengths, rows = [9, 14, 19], [0, 1, 3]
    for slot, length, row in zip(rows, lengths, tokens, strict=True):
        in_slots.prefill(slot, row[:length].tolist(), 0, keep=1)
    blocks = [in_slots.block(3, 0, 8), in_slots.block(3, 8, 19)]
    in_slots.fill(2, blocks)
    newest = torch.tensor([tokens[0, 9], tokens[1, 14], tokens[2, 19], tokens[2, 19]])
    unread = in_slots.unread
    where = torch.tensor([[9, 14, 19, 0], [9, 14, 19, unread], [-1] * 4])
    logits = in_slots.decode(newest, where, 32)
    for slot, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        with torch.no_grad():
            own = model(row[None, : length + 1]).logits[0, -1]
            exact = tiny("llama").double()(row[None, : length + 1]).logits[0, -1]
        assert_no_further(logits[slot], own, exact)


def test_a_prompt_that_moves_the_cache_leaves_no_graph_of_the_old_one():
    class AtOneAddress(StandIn):
        def __call__(self, function: Any) -> Any:
            replay, results = super().__call__(function)
            keys = runner.model.layers[0].keys

            def replayed() -> None:
                assert runner.model.layers[0].keys is keys
                replay()

            return replayed, results

    recorder = AtOneAddress()
    runner = SlotRunner(tiny("llama"), 2, 600, Graphs(recorder))
    runner.step([Chunk(0, range(3, 9), 0, None, 1)])
    for step in range(8):
        if step == 4:  # longer than the places of a slot at first
            runner.step([Chunk(1, [5] * slots.FIRST_PLACES, 0, None, 1)])
        runner.step([Chunk(0, (-1,), 6 + step, None, 1, decoding=True)])
    assert runner.graphs.why_not is None
    assert (recorder.recorded, recorder.replayed) == (2, 8)


def test_threads_that_compute_are_on_the_bases_device(in_slots, tmp_path, monkeypatch):
    """A thread begins on the first of several."""
    threads = set()
    for module in (engines, adapter_cache):
        monkeypatch.setattr(module, "use_device", lambda _: threads.add(current_thread().name))
    homes = write_adapters(tmp_path, "llama")
    with Engine(base_of("llama"), Library(homes), SMALL) as engine:
        assert ids_of(engine.submit(asked(1, next(iter(homes)))))
    assert threads == {"veneer-engine", "veneer-loader_0"}


def test_the_end_is_read_one_step_late(in_slots):
    """An answer that its own end cuts short, whose slot goes to another."""
    base = base_of("llama")
    number, alone = next(
        (n, answer)
        for n in range(20)
        if len(set(answer := generated(base.model, [asked(n).tokens], 8)[0])) > 2
    )
    end = list(dict.fromkeys(alone))[2]
    base.model.generation_config.eos_token_id = end
    with Engine(base, config=EngineConfig(slots=1, chunk=16)) as engine:
        streams = [engine.submit(asked(n)) for n in (number, number + 1, number)]
        answers = [stream.result() for stream in streams]
    assert answers[0].reason == answers[2].reason == "stop"
    expected = alone[: alone.index(end)]
    for answer in (answers[0], answers[2]):
        assert [token.id for token in answer.tokens] == expected
        assert answer.new_tokens == len(expected) + 1


@pytest.mark.parametrize("ends_by", ["a stop text", "a reader that goes", "a step that fails"])
def test_what_ends_a_row_leaves_nothing_to_the_next_one_of_its_slot(ends_by, in_slots, monkeypatch):
    """Tokens of the ended row are on their way then."""
    base, plain_step, steps = base_of("llama"), SlotRunner.step, count()
    alone, next_one = (generated(base.model, [asked(n).tokens], 8)[0] for n in (1, 2))
    text = base.tokenizer.decode(alone)
    stop = text[3:5] if ends_by == "a stop text" else "no such text"

    def step(self: SlotRunner, chunks: Any) -> torch.Tensor:
        if ends_by == "a step that fails" and next(steps) == 4:
            raise RuntimeError("lost")
        return plain_step(self, chunks)

    monkeypatch.setattr(SlotRunner, "step", step)
    with Engine(base, config=EngineConfig(slots=1, chunk=16)) as engine:
        long = Sampling(max_new_tokens=8 if ends_by == "a stop text" else 200)
        first = engine.submit(asked(1, sampling=long, stop=(stop,)))
        second = engine.submit(asked(2))
        if ends_by == "a reader that goes":
            next(iter(first))
            first.cancel()
        answer, after = first.result(), second.result()
        assert engine.stats.requests == 2
        assert engine.stats.new_tokens == answer.new_tokens + after.new_tokens
    assert [token.id for token in after.tokens] == next_one
    assert answer.new_tokens < long.max_new_tokens
    if ends_by == "a stop text":
        assert (answer.reason, answer.text) == ("stop", text[: text.index(stop)])
    elif ends_by == "a reader that goes":
        assert answer.reason == "cancelled"
    else:
        assert (answer.reason, str(answer.error)) == ("error", "lost")


def test_rows_with_penalties_and_grammars_are_as_with_the_other_runner(request):
    kinds = [
        {"adjustments": adjustments, "grammar": grammar}
        for adjustments in (Adjustments(), Adjustments(0.5, 0.5, 1.3, ((7, 1.0),)))
        for grammar in (None, Grammar("regex", "[0-9]{3}[a-f]*"))
    ]

    def answers() -> list[list[int]]:
        with Engine(base_of("llama"), config=SMALL) as engine:
            streams = [engine.submit(asked(n, **kind)) for n, kind in enumerate(kinds)]
            return [ids_of(stream) for stream in streams]

    expected = answers()
    request.getfixturevalue("in_slots")
    assert answers() == expected


@pytest.mark.usefixtures("in_slots")
def test_scores_are_those_of_the_other_runner():
    with Engine(base_of("llama"), config=SMALL) as engine:
        assert isinstance(engine.runner, SlotRunner)
        ours = engine.score(asked(6).tokens)
    model = tiny("llama")
    with torch.no_grad():
        logs = [
            m(torch.tensor([asked(6).tokens])).logits[0].log_softmax(-1)
            for m in (model, model.double())
        ]
    own, exact = (x[range(len(ours) - 1), asked(6).tokens[1:]] for x in logs)
    assert ours[0] is None
    assert_no_further(torch.tensor(ours[1:]), own, exact)


@pytest.mark.parametrize("architecture", ["falcon_h1", "mamba"])
def test_what_keeps_more_than_keys_and_values_is_not_in_slots(architecture):
    with pytest.raises(NotInSlots):
        SlotModel(tiny(architecture), 2, 64)


def test_a_model_that_gives_something_else_is_noticed(monkeypatch):
    model = tiny("mistral")
    model.config.sliding_window = 5
    in_slots = SlotModel(model, 2, 64)
    monkeypatch.setattr(SlotModel, "_masks", lambda self, positions: None)
    with pytest.raises(NotInSlots):
        in_slots._prove()


def test_other_devices_take_slots_and_others_their_own_forward(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "device", torch.device("meta"), raising=False)
    monkeypatch.setattr(choice, "SlotRunner", lambda *_: (_ for _ in ()).throw(NotInSlots("it")))
    monkeypatch.setattr(choice, "GeneralRunner", lambda *_: "general")
    runner, notices = choice.runner_for(model, 2, 64)
    assert (runner, len(notices)) == ("general", 1)


# ---- the sampler ----


def test_rows_are_drawn_at_once_as_each_asks():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    settings = [
        Sampling(),
        Sampling(temperature=1.0, top_k=3, seed=1),
        Sampling(temperature=0.7, top_p=0.6, seed=2),
        Sampling(temperature=1.5, top_k=8, top_p=0.5, seed=3),
        Sampling(temperature=2.0, seed=4),
    ]
    device = torch.device("cpu")
    settings = [Request((1,), sampling=each) for each in settings]
    settings.append(replace(settings[-1], adjustments=Adjustments(min_p=0.3)))

    def samplers() -> list[Sampler]:
        return [Sampler.of(each, device) for each in settings]

    ours = samplers()
    drawn = torch.stack([drawn_at_once(logits, ours) for _ in range(200)])
    again = samplers()
    assert torch.equal(drawn[:5], torch.stack([drawn_at_once(logits, again) for _ in range(5)]))
    # Alone a row is drawn as it is among others.
    alone = samplers()[3:4]
    assert torch.equal(
        drawn[:5, 3], torch.cat([drawn_at_once(logits[3:4], alone) for _ in range(5)])
    )
    for row, each in enumerate(settings):
        sampling, min_p = each.sampling, each.adjustments.min_p
        if sampling.temperature == 0:
            assert set(drawn[:, row].tolist()) == {int(logits[row].argmax())}
            continue
        chances, order = (logits[row] / sampling.temperature).softmax(-1).sort(descending=True)
        chances = chances[chances >= min_p * chances[0]][: sampling.top_k or None]
        before = (chances.cumsum(0) - chances) / chances.sum()
        allowed = order[: len(chances)][before < sampling.top_p].tolist()
        seen = set(drawn[:, row].tolist())
        assert seen <= set(allowed)
        assert len(seen) > 1
        # The likeliest comes about as often as it should: within five standard deviations.
        share = float(chances[0] / chances[before < sampling.top_p].sum())
        often = float((drawn[:, row] == order[0]).float().mean())
        assert abs(often - share) < 5 * (share * (1 - share) / 200) ** 0.5
