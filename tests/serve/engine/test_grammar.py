"""Answers that follow a grammar, and rows beside them that do not."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from support.json_schemas import problem, schemas
from support.random_adapters import tokenizer
from support.tiny_models import SHAPE, with_large_weights
from veneer.errors import RequestError
from veneer.generate.sampling import Sampling
from veneer.models.load import Base, load_base
from veneer.serve.engine import grammar as grammars
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.grammar import Grammars, choice_of
from veneer.serve.engine.request import Adjustments, EngineConfig, Grammar, Request

VOCAB = 98  # all of ASCII that prints
PROMPT = (5, 6, 7, 8)
GREEDY = Sampling(max_new_tokens=24)


def base(end=False):
    """Return a random model that writes single characters."""
    shape = SHAPE | {"vocab_size": VOCAB, "max_position_embeddings": 1024}
    model = with_large_weights(AutoModelForCausalLM.from_config(LlamaConfig(**shape)))
    model.generation_config.eos_token_id = 2 if end else None
    characters = tokenizer(VOCAB)
    if not end:
        characters.eos_token = None
    return Base("tiny", model, characters)


@pytest.fixture(scope="module")
def engine():
    with Engine(base(), config=EngineConfig(slots=4, chunk=16)) as engine:
        yield engine


def ask(engine, grammar, sampling=GREEDY, **options):
    return engine.submit(Request(PROMPT, None, sampling, grammar=grammar, **options)).result()


def refusal(engine, grammar):
    try:
        error = ask(engine, grammar).error
    except RequestError as raised:
        return raised
    assert isinstance(error, RequestError)
    return error


def drawn(seed, most=900):
    return Sampling(max_new_tokens=most, temperature=1.0, seed=seed)


def test_an_answer_is_json_of_its_schema(engine):
    asked = [
        (schema, ask(engine, Grammar("json_schema", json.dumps(schema)), drawn(n)))
        for n, schema in enumerate(schemas(6, seed=1))
    ]
    for schema, answer in asked:
        assert answer.reason == "stop", answer.text
        assert not problem(answer.text, schema)


def test_an_answer_is_what_an_expression_or_a_choice_or_a_grammar_says(engine):
    expression = r"[a-f]{3}-[0-9]{2,4}(x|yy)"
    answer = ask(engine, Grammar("regex", expression))
    assert re.fullmatch(expression, answer.text)
    assert answer.reason == "stop"
    choices = ["it is so", "it is not", 'a "quote"']
    assert ask(engine, Grammar("grammar", choice_of(choices))).text in choices
    lark = 'start: pair ("," pair)~2\npair: /[a-z]/ "=" NUMBER\nNUMBER: /[0-9]{1,2}/'
    assert re.fullmatch(
        r"([a-z]=\d{1,2},){2}[a-z]=\d{1,2}", ask(engine, Grammar("grammar", lark)).text
    )
    gbnf = 'root ::= ("ab" | "ba")+ "!"'
    text = ask(
        engine, Grammar("grammar", gbnf), Sampling(max_new_tokens=9, temperature=1.0, seed=1)
    ).text
    assert re.fullmatch(r"(ab|ba)*(a|b|!)?", text)


def test_rows_without_a_grammar_are_as_alone(engine):
    grammar = Grammar("regex", "[0-9]{12}")
    requests = [
        Request((*PROMPT, n), None, sampling, grammar=own, logprobs=2)
        for n in range(3)
        for own in (None, grammar)
        for sampling in (Sampling(max_new_tokens=12), drawn(n, 12))
    ]
    together = [stream.result() for stream in map(engine.submit, requests)]
    alone = [engine.submit(request).result() for request in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    for request, answer in zip(requests, together, strict=True):
        assert answer.text.isdigit() == (request.grammar is not None)


def test_the_end_token_comes_where_the_grammar_may_end_and_nowhere_else():
    with Engine(base(end=True), config=EngineConfig(slots=2, chunk=16)) as engine:
        endless = Grammar("regex", "[0-9]{5}[a-z]*")
        eager = Adjustments(logit_bias=((2, 100.0),))  # it would rather end at once
        answer = ask(engine, endless, adjustments=eager)
    assert re.fullmatch("[0-9]{5}", answer.text)
    assert (answer.reason, answer.new_tokens) == ("stop", 6)


def test_what_cannot_be_followed_is_refused_with_its_reason(engine):
    for grammar, why in (
        (
            Grammar("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "guided_json"),
            "guided_json",
        ),
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("json_schema", '{"$ref": "http://example.org/x"}'), "example.org"),
        (Grammar("regex", "(a"), "error: unclosed group"),
        (Grammar("regex", "(((a{1,999}){1,999}){1,999}){1,999}"), "cannot be followed"),
        (Grammar("grammar", "start: nowhere"), "nowhere"),
        (Grammar("grammar", choice_of(["é"])), "no token"),
    ):
        error = refusal(engine, grammar)
        assert why in str(error)
        assert error.param == grammar.asked_by
    assert ask(engine, Grammar("regex", "[0-9]{3}")).text.isdigit()


def test_a_grammar_beyond_the_limits_is_refused_before_any_row_waits_for_it(engine):
    for grammar in (
        Grammar("regex", "(a{1000}){1000}"),
        Grammar("grammar", choice_of(["x" * 400 + str(n) for n in range(1024)])),
    ):
        with pytest.raises(RequestError, match="too many"):  # by `submit`, not in the answer
            engine.submit(Request(PROMPT, None, GREEDY, grammar=grammar))


def test_a_grammar_is_compiled_once_while_it_is_used(monkeypatch):
    compiled = []

    def compile_(tokenizer, grammar, real=grammars._compile):
        compiled.append(grammar.text)
        return real(tokenizer, grammar)

    monkeypatch.setattr(grammars, "_compile", compile_)
    monkeypatch.setattr(grammars, "COMPILED", 2)
    own = Grammars(tokenizer(VOCAB), VOCAB)
    for text in "abacaba":
        own.matcher(Grammar("regex", text)).accept(own.tokenizer.encode(text)[0])
    assert compiled == ["a", "b", "c", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("random", [True, False])
def test_500_answers_over_50_schemas(random):
    """With a real model's tokens, drawn by a model that would write anything, and by itself."""
    base = load_base("smollm2-135m")
    encode, vocab = base.tokenizer.encode, base.model.config.vocab_size
    if random:
        shape = SHAPE | {"vocab_size": vocab, "max_position_embeddings": 2048}
        model = with_large_weights(AutoModelForCausalLM.from_config(LlamaConfig(**shape)))
        base = Base("random", model, base.tokenizer)
    faults = []
    with Engine(base, config=EngineConfig(slots=16, context=2048, queue=2000)) as engine:
        streams = []
        for n, schema in enumerate(schemas(50) * (10 if random else 1)):
            text = f"Write an example of JSON of this schema: {json.dumps(schema)}\n"
            prompt = PROMPT if random else tuple(encode(text))
            grammar = Grammar("json_schema", json.dumps(schema))
            request = Request(prompt, None, drawn(n, 1000), grammar=grammar)
            streams.append((schema, engine.submit(request)))
        for schema, stream in streams:
            answer = stream.result()
            why = problem(answer.text, schema) if answer.reason == "stop" else answer.reason
            faults += [(why, answer.error, answer.text, schema)] if why else []
    assert not faults, (len(faults), faults[:3])
