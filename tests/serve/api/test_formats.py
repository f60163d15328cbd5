"""What a request says its answer must be, and how its logits change, by OpenAI's client."""

import json

import openai
import pytest

from support.server import BASE
from veneer.serve.engine.request import Adjustments

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def asked(client, server):
    """Return what the engine is asked for, by a chat and, but for `response_format`, by text."""

    def ask(**options):
        client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=1, extra_body=options)
        client.completions.create(model=BASE, prompt="Hello", max_tokens=1, extra_body=options)
        chat, text = server.served.engine.requests[-2:]
        assert (chat.grammar, chat.adjustments) == (text.grammar, text.adjustments)
        assert chat.sampling == text.sampling
        return chat

    return ask


def test_what_changes_the_logits_arrives(asked):
    request = asked(
        frequency_penalty=-0.5,
        presence_penalty=1,
        repetition_penalty=1.25,
        logit_bias={"5": 100, "95": -1.5},
        min_p=0.05,
        top_k=40,
    )
    assert request.adjustments == Adjustments(-0.5, 1.0, 1.25, ((5, 100.0), (95, -1.5)), 0.05)
    assert request.sampling.top_k == 40
    plain = asked(top_k=-1, logit_bias={}, min_p=0, frequency_penalty=0)
    assert not plain.adjustments.of_logits
    assert plain.sampling.top_k == 0


@pytest.mark.parametrize(
    ("asks", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": SCHEMA},
                }
            },
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "grammar", 'start: "a" | "b"'),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "grammar", "start: /a/"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "grammar", 'start: "a"'),
        ({"guided_grammar": "start: /a/"}, "grammar", "start: /a/"),
    ],
)
def test_each_way_to_ask_for_a_form(asked, asks, kind, text):
    grammar = asked(**asks).grammar
    assert (grammar.kind, grammar.text) == (kind, text)
    assert grammar.asked_by == next(iter(asks))


def test_a_model_of_pydantic_as_the_form(client, server):
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        label: str

    with pytest.raises(openai.LengthFinishReasonError):  # the scripted engine knows no JSON
        client.chat.completions.parse(
            model=BASE, messages=HELLO, response_format=Point, max_tokens=1
        )
    schema = json.loads(server.served.engine.requests[-1].grammar.text)
    assert schema["required"] == ["x", "label"]


DEEP = json.loads('{"a":' * 100 + "{}" + "}" * 100)


@pytest.mark.parametrize(
    ("asks", "why"),
    [
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "cannot be followed"),
        ({"response_format": {"type": "json_schema"}}, "should have json_schema"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "should have one of"),
        ({"structured_outputs": {}}, "should have one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"guided_json": "{"}, "but not JSON"),
        ({"guided_grammar": "x" * 200_001}, "at most 200000"),
        ({"guided_json": DEEP}, "more than 64 deep"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -2}, "top_k"),
    ],
)
def test_what_cannot_be_asked_names_its_parameter(client, asks, why):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body=asks)
    assert why in error.value.message
    assert error.value.param.split(".")[0] in asks
