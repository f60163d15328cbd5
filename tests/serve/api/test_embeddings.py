"""Embeddings by OpenAI's client, with numbers as they are and as base64."""

import base64
import struct

import openai
import pytest

from support.server import BASE, call


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_texts_and_tokens_by_the_base_and_an_adapter(client, server):
    engine = server.served.engine
    one = client.embeddings.create(model="law", input="Once")  # the client asks for base64
    assert one.data[0].embedding == pytest.approx([0.6, 0.8])
    assert (_names(engine.requests[-1]), engine.requests[-1].embedding) == ({"law": 1.0}, "mean")
    assert one.usage.prompt_tokens == len(engine.requests[-1].tokens) == 4
    several = client.embeddings.create(
        model=BASE, input=["Once", "more"], encoding_format="float", extra_body={"pooling": "last"}
    )
    assert [(each.index, each.embedding) for each in several.data] == [
        (0, [0.6, -0.8]),
        (1, [0.6, -0.8]),
    ]
    client.embeddings.create(model=BASE, input=[[5, 6], [7]], dimensions=2)
    assert [request.tokens for request in engine.requests[-2:]] == [(5, 6), (7,)]
    client.embeddings.create(model=BASE, input=[5, 6], extra_body={"adapters": {"law": 0.5}})
    assert _names(engine.requests[-1]) == {"law": 0.5}


def _names(request):
    return {entry.name: weight for entry, weight in request.adapter}


def test_all_texts_and_choices_are_of_one_version(server, two):
    served, seen = server.served, []
    submit = served.engine.submit

    def submit_and_replace(request):
        seen.append(request.adapter)
        served.library.add("law", two["law"])
        return submit(request)

    served.engine.submit = submit_and_replace
    first = served.library.info("law")
    body = {"model": "law", "input": ["Once", "more"]}
    assert call(server.url, "/v1/embeddings", body)[0] == 200
    assert seen == [((first, 1.0),)] * 2
    second = served.library.info("law")
    body = {"model": "law", "prompt": ["Once", "more"], "n": 2, "max_tokens": 2}
    assert call(server.url, "/v1/completions", body)[0] == 200
    assert seen[2:] == [((second, 1.0),)] * 4


def test_base64_is_little_endian_float32(server):
    body = {"model": BASE, "input": "a", "encoding_format": "base64"}
    status, _, reply = call(server.url, "/v1/embeddings", body)
    packed = base64.b64decode(reply["data"][0]["embedding"])
    assert status == 200
    assert struct.unpack("<2f", packed) == pytest.approx((0.6, 0.8))


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"dimensions": 3}, "dimensions"),
        ({"input": ""}, "input"),
        ({"input": [96]}, "input"),
        ({"pooling": "max"}, "pooling"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_cannot_be_embedded_names_its_parameter(server, more, param):
    status, _, reply = call(server.url, "/v1/embeddings", {"model": BASE, "input": "a", **more})
    assert status in (400, 404)
    assert reply["error"]["param"] == param


def test_an_error_within_is_the_servers(server, caplog):
    server.served.engine.fail = "the lamp went out"
    status, _, reply = call(server.url, "/v1/embeddings", {"model": BASE, "input": "a"})
    assert (status, reply["error"]["type"]) == (500, "server_error")
