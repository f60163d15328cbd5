"""OpenAI's own client, as it is, against the server."""

import openai
import pytest

from support.server import API, BASE, running, scripted
from veneer.serve.api import protocol, strict
from veneer.serve.config import Keys
from veneer.serve.engine.vocabulary import Vocabulary

HELLO = [{"role": "user", "content": "Hello"}]


def client_of(server, key="none", **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **options)


@pytest.fixture
def client(server):
    return client_of(server)


def test_it_lists_the_base_and_the_adapters(client, server, monkeypatch):
    engine = server.served.engine
    behind = Vocabulary(engine.words.tokenizer, engine.words.size, virtual=20)
    monkeypatch.setattr(
        engine, "vocabulary", lambda which: behind if which == "law" else engine.words
    )
    models = client.models.list().data
    assert [model.max_model_len for model in models] == [4096, 4096, 4076]
    assert [model.id for model in models] == [BASE, "cooking", "law"]
    assert [model.parent for model in models] == [None, BASE, BASE]
    assert models[0].root == "made/of/nothing"
    assert models[1].root.endswith("cooking")
    assert client.models.retrieve("law").parent == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("medicine")


def test_it_chats_with_the_adapter_that_it_names(client, server):
    answer = client.chat.completions.create(model="cooking", messages=HELLO, max_tokens=4)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == "cooking says word 0 word 1"
    assert choice.finish_reason == "length"
    assert answer.model == "cooking"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert _names(server.served.engine.requests[-1]) == {"cooking": 1.0}


def test_a_stream_is_the_whole_answer_in_pieces(client):
    stream = client.chat.completions.create(
        model="law",
        messages=HELLO,
        max_completion_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "law says word 0 word 1 word 2"
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == "length"
    assert not any(ends[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = client.chat.completions.create(model="law", messages=HELLO, max_tokens=2, stream=True)
    assert all(chunk.usage is None for chunk in plain)


def test_several_answers_have_seeds_of_their_own(client, server):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, n=3, seed=7, max_tokens=2, temperature=0.5, top_p=0.25
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    asked = server.served.engine.requests[-3:]
    assert [request.sampling.seed for request in asked] == [7, 8, 9]
    assert {(r.sampling.temperature, r.sampling.top_p) for r in asked} == {(0.5, 0.25)}
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(asked[0].tokens)  # which counts once
    pieces = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=BASE, messages=HELLO, n=2, max_tokens=3, stream=True
    ):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == dict.fromkeys((0, 1), "base says word 0")


def test_stops_and_the_usual_settings_arrive(client, server):
    answer = client.chat.completions.create(model=BASE, messages=HELLO, stop="word 1")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "base says word 0"
    request = server.served.engine.requests[-1]
    assert request.stop == ("word 1",)
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_new_tokens == 4096 - len(request.tokens)
    client.chat.completions.create(model=BASE, messages=HELLO, stop=["a", "b"], max_tokens=1)
    assert server.served.engine.requests[-1].stop == ("a", "b")


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2
    )
    first, _ = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, bytes(first.bytes)) == ("base", -0.5, b"base")
    assert [top.logprob for top in first.top_logprobs] == [-1.0, -2.0]
    assert all(top.token for top in first.top_logprobs)
    plain = client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=2)
    assert plain.choices[0].logprobs is None


def test_completions_of_texts_and_of_tokens(client, server):
    answer = client.completions.create(model="law", prompt="Once", logprobs=1, max_tokens=3)
    choice = answer.choices[0]
    assert choice.text == "law says word 0"
    assert choice.logprobs.tokens == ["law", " says", " word 0"]
    assert choice.logprobs.text_offset == [0, 3, 8]
    assert choice.logprobs.token_logprobs == [-0.5] * 3
    assert [list(top.values()) for top in choice.logprobs.top_logprobs] == [[-1.0]] * 3
    engine = server.served.engine
    assert engine.requests[-1].tokens == tuple(server.served.tokenizer("Once")["input_ids"])
    assert client.completions.create(model=BASE, prompt="a").usage.completion_tokens == 16
    client.completions.create(model=BASE, prompt=[5, 6, 7], max_tokens=1)
    assert engine.requests[-1].tokens == (5, 6, 7)
    both = client.completions.create(model=BASE, prompt=["ab", "c"], n=2, max_tokens=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == 3
    client.completions.create(model=BASE, prompt=[[5], [6]], max_tokens=1)
    assert {request.tokens for request in engine.requests[-2:]} == {(5,), (6,)}
    streamed = client.completions.create(model=BASE, prompt="a", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "base says word 0"


# A value of each parameter that is ignored, and null for all that may be left out.
IGNORED = {
    "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "store": True,
    "user": "u",
}
HARMLESS = [
    *IGNORED.items(),
    ("store", False),
    ("parallel_tool_calls", True),
    *((name, value) for name, values in protocol.NEUTRAL.items() for value in (*values, None)),
    *(
        (name, None)
        for name, field in protocol.ChatRequest.model_fields.items()
        if not field.is_required() and name != "max_tokens"
    ),
    ("n", 1),
    ("logprobs", False),
    ("temperature", 1),
    ("top_p", 1),
    ("stream", False),
]


def test_what_changes_no_answer_is_accepted_and_noted_once(client, server, caplog):
    assert IGNORED.keys() == protocol.IGNORED.keys()
    strict._note.cache_clear()
    caplog.set_level("INFO", "veneer.serve")
    engine = server.served.engine

    def answered(**more):
        asked = {"model": "law", "messages": HELLO, "max_tokens": 2, "extra_body": more}
        reply = client.chat.completions.create(**asked).to_dict()
        return engine.requests[-1], {**reply, "id": "", "created": 0}

    plain = answered()
    for name, value in [*HARMLESS, *IGNORED.items()]:
        assert answered(**{name: value}) == plain, (name, value)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert answered(tools=tools, tool_choice="none") == plain
    with pytest.raises(openai.BadRequestError, match="template writes no calls"):
        answered(tools=tools, tool_choice="auto")
    notes = [record.getMessage() for record in caplog.records if record.name == "veneer.serve"]
    assert notes == [
        *(f"The parameter {n} is ignored: {protocol.IGNORED[n]}." for n in IGNORED),
        'The parameter tools is ignored: tool_choice is "none".',
    ]
    options = {"include_usage": True, "include_obfuscation": True, "continuous_usage_stats": False}
    stream = client.chat.completions.create(
        model="law",
        messages=HELLO,
        max_tokens=2,
        stream=True,
        extra_body={"stream_options": options},
    )
    assert [*stream][-1].usage.completion_tokens == 2
    assert engine.requests[-1] == plain[0]
    assert len([r for r in caplog.records if r.name == "veneer.serve"]) == len(IGNORED) + 2


def test_an_answer_can_be_sent_back_as_it_came(client, server):
    answer = client.chat.completions.create(model=BASE, messages=HELLO, max_tokens=2)
    turns = [*HELLO, answer.choices[0].message, {"role": "user", "content": "And?", "name": "Ann"}]
    client.chat.completions.create(model=BASE, messages=turns, max_tokens=1)
    read = server.served.tokenizer.decode(server.served.engine.requests[-1].tokens)
    assert "base says" in read
    assert "Ann" not in read


def _names(request):
    return {entry.name: weight for entry, weight in request.adapter}


def test_a_mix_of_adapters(client, server):
    client.chat.completions.create(
        model=BASE,
        messages=HELLO,
        extra_body={"adapters": {"law": 0.5, "cooking": -1}},
        max_tokens=1,
    )
    assert _names(server.served.engine.requests[-1]) == {"law": 0.5, "cooking": -1}
    for wrong in ({"medicine": 1.0}, {BASE: 1.0}, {}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            client.chat.completions.create(
                model=BASE, messages=HELLO, extra_body={"adapters": wrong}
            )


def test_right_errors(client, server):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        create(model="cookin", messages=HELLO)
    assert error.value.code == "model_not_found"
    assert "did you mean 'cooking'?" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        create(model=BASE, messages=HELLO, temperature=9)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"4,096 tokens, but .* 4,095 .* answer"):
        create(model=BASE, messages=HELLO, max_tokens=4095)
    server.served.engine.fail = "the lamp went out"
    with pytest.raises(openai.InternalServerError) as error:
        create(model=BASE, messages=HELLO, max_tokens=1)
    assert error.value.request_id in error.value.message
    with pytest.raises(openai.APIError, match=r"failed at request [0-9a-f]+; its log"):
        list(create(model=BASE, messages=HELLO, max_tokens=1, stream=True))


def test_a_full_queue_says_come_again():
    with running(served := scripted(slots=1, queue=1, pace=0.05)) as server:
        client = client_of(server)
        create = client.chat.completions.create
        streams = [create(model=BASE, messages=HELLO, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as error:
            create(model=BASE, messages=HELLO)
        assert int(error.value.response.headers["retry-after"]) >= 1
        # Three answers at once take no place that one of them lacks.
        with pytest.raises(openai.RateLimitError):
            create(model=BASE, messages=HELLO, n=3)
        for stream in streams:
            stream.close()
        assert served.engine.fail == ""


def test_keys(two):
    keys = Keys(api=API)
    with running(scripted(two), keys=keys) as server:
        assert len(client_of(server, API).models.list().data) == 3
        for wrong in ("another-key-of-this-length", API + "x", API[:-1]):
            with pytest.raises(openai.AuthenticationError) as error:
                client_of(server, wrong).models.list()
            assert API not in str(error.value)
    assert API not in repr(keys)
