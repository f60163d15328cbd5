"""Tokens that are guessed and computed at once: they change how fast an answer comes, and nothing
of the answer."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from support.random_adapters import tokenizer
from support.serving_bases import PROMPT, base_of, write_adapters
from support.tiny_models import VOCAB
from veneer.generate.runners.layer_table import Unsuited
from veneer.generate.sampling import Sampling
from veneer.kernels import native
from veneer.models.load import Base
from veneer.serve.engine.drafts import CHANCES, GRAMMAR_CHANCE, Drafter
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.grammar import Matcher
from veneer.serve.engine.library import Library
from veneer.serve.engine.prefix import PrefixCache
from veneer.serve.engine.request import Adjustments, EngineConfig, Grammar, Request
from veneer.serve.engine.row import Row
from veneer.serve.engine.sampler import Sampler
from veneer.serve.engine.scheduler import MARGIN, NOT_DRAFTED, Scheduler
from veneer.serve.engine.step_cost import LEAST, MOST, UNMEASURED, StepCost

compiles = pytest.mark.skipif(native.library_of("decode")[0] is None, reason="needs a compiler")
GREEDY = Sampling(max_new_tokens=40)
REPEATING = (*PROMPT[:9], *PROMPT[:9], *PROMPT[:4])


def guessed(drafter: Drafter, most: int) -> list[int]:
    return [token for token, _ in drafter.guess(most)]


def test_a_guess_is_what_followed_the_longest_match():
    assert guessed(Drafter([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]), 3) == [4, 9, 2]
    assert guessed(Drafter([7, 1, 2, 8, 1, 2, 9, 1, 2]), 1) == [9]  # of equal ones the last
    assert guessed(Drafter([1, 2, 3, 4, 5]), 4) == []
    assert guessed(Drafter([1, 2, 3, 1, 2]), 5) == [3, 1, 2, 3, 1]  # beyond its own end
    drafter = Drafter([1, 2, 3, 4, 5, 6])
    for token in (9, 1, 2, 3):
        drafter.add(token)
    assert guessed(drafter, 9) == [4, 5, 6, 9, 1, 2, 3, 4, 5]


def test_chances_follow_what_came():
    drafter = Drafter([*range(30), 0, 1])
    first = [chance for _, chance in drafter.guess(8)]
    assert first[0] == CHANCES[2]
    assert first == sorted(first, reverse=True)
    for token in range(2, 30):
        drafter.add(token)
    assert next(drafter.guess(1))[1] > CHANCES[8]
    wrong = Drafter([1, 2, 3, 1, 2])
    for n in range(20):  # the same two again and again, and each time something else behind them
        for token in (100 + n, 1, 2):
            wrong.add(token)
    assert next(wrong.guess(1))[1] < CHANCES[2] / 4
    for n in range(20):  # a grammar asks for 7, and the model writes it in other tokens
        assert next(wrong.guess(1, [7]))[0] == 7
        wrong.add(200 + n)
    assert next(wrong.guess(1, [7]))[1] < GRAMMAR_CHANCE / 4


def drafts(rows: list[Any], reading: float, most: int = 16) -> dict[Any, list[int]]:
    scheduler = Scheduler(SimpleNamespace(cut=4), PrefixCache(0), 64, drafted=most)
    return scheduler._drafts(rows, reading + len(rows))


def row(drafter: Drafter | None, most: int = 100) -> Any:
    stream: Any = SimpleNamespace(request=Request((1,)))
    nothing: Any = None
    return Row(stream, (), Sampler(GREEDY), nothing, most, frozenset(), drafter=drafter, new=1)


def sure() -> Drafter:
    drafter = Drafter([*range(50), 0, 1])
    for token in range(2, 40):
        drafter.add(token)
    return drafter


def test_a_guess_is_computed_where_it_pays():
    one = row(sure())
    assert drafts([one], reading=8) == {one: [*range(40, 50), *range(6)]}
    assert drafts([one], reading=8, most=3) == {one: [40, 41, 42]}
    assert drafts([row(sure(), most=6)], reading=8).popitem()[1] == [40, 41, 42, 43]
    assert drafts([row(None)], reading=8) == {}
    # Beside others it makes a step half as long again at most, and they have the better ones.
    rows = [row(sure()), row(Drafter([1, 2, 3, 1, 2])), row(None), row(sure())]
    together = drafts(rows, reading=12)
    assert sum(map(len, together.values())) == 8
    assert {*together} == {rows[0], rows[3]}
    # A chance of 0.3 is worth it where the weights take as long as eight tokens, but not as one.
    unsure = row(Drafter([1, 2, 3, 1, 2]))
    assert drafts([unsure], reading=8) == {unsure: [3]}
    assert drafts([unsure], reading=CHANCES[2] ** -1 * MARGIN - 1) == {}


@pytest.mark.parametrize("seed", range(3))
def test_guesses_that_fail_cost_little(seed):
    """Tokens at random of so few that pairs recur all the time: in the time of single tokens, an
    answer of 200 takes 1/0.95 of what it must at most."""
    draw = random.Random(seed)
    drafter = Drafter([draw.randrange(20) for _ in range(100)])
    spent = 0
    for n in range(200):
        spent += 1 + UNMEASURED
        guesses = drafts([row(drafter, 200 - n + 1)], UNMEASURED)
        guesses = next(iter(guesses.values()), [])
        spent += len(guesses)
        drafter.add(draw.randrange(20))
    assert spent < 200 * (1 + UNMEASURED) / 0.95


def test_the_cost_of_a_step_is_measured():
    cost = StepCost()
    assert cost.beside(3) == UNMEASURED + 3
    for n in range(64):
        tokens = (1, 4, 64)[n % 3]
        cost.add(tokens, (0.02 + 0.001 * tokens) * (10 if n % 7 == 0 else 1))
    assert cost.reading == pytest.approx(20, rel=0.01)
    for bad, reading in ((lambda n: 1.0, MOST), (lambda n: float(n), LEAST)):
        cost = StepCost()
        for n in range(64):
            cost.add(1 + n % 40, bad(1 + n % 40))
        assert cost.reading == reading
    alike = StepCost()
    for _ in range(64):
        alike.add(2, 0.01)
    assert alike.reading == UNMEASURED


def requests(names: list[str | None]) -> list[Request]:
    """Return requests of every kind that changes what a row draws from, or where it ends."""
    sampled = Sampling(max_new_tokens=30, temperature=0.4, top_p=0.9, seed=3)
    greedy = Sampling(max_new_tokens=30)
    asks: list[dict[str, Any]] = [
        {},
        {"sampling": sampled, "logprobs": 2},
        {"adjustments": Adjustments(frequency_penalty=0.3, repetition_penalty=1.05), "logprobs": 1},
        {"adjustments": Adjustments(logit_bias=((PROMPT[0], 3.0), (7, -2.0)))},
        {"grammar": Grammar("regex", "(ab?c[a-d]){6,}")},
        {"sampling": Sampling(max_new_tokens=7)},
    ]
    return [
        Request(REPEATING, name, **{"sampling": greedy, **asked})
        for name in names
        for asked in asks
    ]


@compiles
@pytest.mark.parametrize(
    ("architecture", "names"), [("llama", [None, "dora"]), ("mistral", [None])]
)
def test_answers_are_the_same_to_the_bit(architecture, names, tmp_path):
    homes = write_adapters(tmp_path, architecture) if names[1:] else {}
    asked = requests(names)
    answers = {}
    for most in (0, 16):
        config = EngineConfig(slots=5, chunk=16, speculate=most)
        with Engine(base(architecture), Library(homes), config) as engine:
            engine._scheduler.cost.reading = MOST  # many guesses, wrong ones too
            whole = [stream.result() for stream in [engine.submit(each) for each in asked]]
            stop = (whole[0].text[4:7],)
            whole.append(engine.submit(Request(REPEATING, None, stop=stop)).result())
            stats = engine.stats
        assert (stats.drafted_tokens > 0) == (most > 0)
        assert stats.new_tokens == sum(answer.new_tokens for answer in whole)
        answers[most] = [(each.tokens, each.text, each.reason, each.new_tokens) for each in whole]
    assert answers[16] == answers[0]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def base(architecture: str) -> Base:
    return Base(architecture, base_of(architecture).model, tokenizer(VOCAB))


@compiles
def test_text_that_repeats_itself_takes_fewer_steps():
    steps = {}
    for most in (0, 4):
        with Engine(base_of(), config=EngineConfig(chunk=16, speculate=most)) as engine:
            # A bias that outweighs everything lets the model say one thing for ever.
            again = Adjustments(logit_bias=((9, 1e4),))
            engine.submit(Request((5, 9, 9, 9), None, GREEDY, adjustments=again)).result()
            stats = engine.stats
        steps[most] = stats.steps
    assert steps[0] == 40
    assert steps[4] <= 10
    assert stats.accepted_tokens == stats.drafted_tokens


@compiles
def test_text_that_a_grammar_leaves_no_choice_of_takes_fewer_steps():
    grammar = Grammar("regex", "(abcdefgh|hgfedcba)xyz[0-9]{2}")
    answers = {}
    for most in (0, 16):
        config = EngineConfig(chunk=16, speculate=most)
        with Engine(base("llama"), config=config) as engine:
            answer = engine.submit(Request((5, 6), None, GREEDY, grammar=grammar)).result()
            answers[most], steps = answer.text, engine.stats.steps
            assert (engine.stats.accepted_tokens > 8) == (most > 0)
    assert answers[0] == answers[16]
    assert steps < 6


def test_what_a_grammar_asks_for_is_a_token_of_the_model():
    """A tokenizer may write a text in added tokens that the model has no embeddings of."""
    llguidance: Any = SimpleNamespace(compute_ff_tokens=lambda: [3, 9, 4])
    assert Matcher(llguidance, vocab=9, end=9, asked_by="regex").forced() == [3]


def test_what_is_not_exact_guesses_nothing(monkeypatch):
    def refuse(*_: Any) -> None:
        raise Unsuited("a test asks for the other runner")

    monkeypatch.setattr("veneer.generate.runners.choice.CompiledRunner", refuse)
    for most, noticed in ((None, False), (0, False), (4, True)):
        with Engine(base_of(), config=EngineConfig(chunk=16, speculate=most)) as engine:
            engine.submit(Request(REPEATING, None, Sampling(max_new_tokens=8))).result()
            assert engine.stats.drafted_tokens == 0
            assert (NOT_DRAFTED in engine.notices) == noticed


@compiles
def test_a_prompt_delays_others_by_a_tokens_time():
    """By counts: beside rows that decode, prompts have so many tokens of a step as take as long."""
    steps: list[list[Any]] = []
    config = EngineConfig(slots=4, chunk=32, speculate=0)
    long = tuple(3 + n % 80 for n in range(61))
    with Engine(base_of(), config=config) as engine:
        alone = engine.submit(Request(long, None, Sampling(max_new_tokens=2))).result()
        vector = engine.submit(Request(long[::-1], None, embedding="mean")).result().embedding
    with Engine(base_of(), config=config) as engine:

        def noted(chunks, step=engine.runner.step):
            steps.append(list(chunks))
            if len(steps) == 3:
                streams.append(engine.submit(Request(long, None, Sampling(max_new_tokens=2))))
                streams.append(engine.submit(Request(long[::-1], None, embedding="mean")))
            return step(chunks)

        engine.runner.step = noted
        streams = [engine.submit(Request(PROMPT[:4], None, Sampling(max_new_tokens=40)))]
        streams.append(engine.submit(Request(PROMPT[:5], None, Sampling(max_new_tokens=40))))
        while len(streams) < 4:
            streams[0].next(timeout=60)
        answers = [stream.result() for stream in streams]
    assert answers[2].tokens == alone.tokens
    assert answers[3].embedding == vector  # to the bit, though it was cut otherwise
    mixed = [chunks for chunks in steps if len({chunk.decoding for chunk in chunks}) == 2]
    assert len(mixed) >= 120 / (UNMEASURED + 4)
    for chunks in mixed:
        rows = sum(chunk.decoding for chunk in chunks)
        assert sum(len(chunk.tokens) for chunk in chunks if not chunk.decoding) <= UNMEASURED + rows
    assert sum(len(c.tokens) for chunks in steps for c in chunks if not c.decoding) == 2 * 61 + 9
