"""A prompt echoed with log probabilities: what the model gives its tokens, in any company."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import ids
from support.server import Server, call
from support.serving_bases import KINDS, base_of, computing_server, write_adapter
from support.tiny_models import VOCAB
from veneer.serve.api import echo

PATH = "/v1/completions"
LONG = ids(1, 40, seed=5)[0].tolist()  # of several chunks
FIRST, SECOND = LONG[:33], ids(1, 21, seed=6)[0].tolist()
TOP = 4


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(home / name, "llama", seed=seed, **KINDS[name])
        for seed, name in enumerate(("wide", "dora"))
    }


@pytest.fixture(scope="module")
def server(homes) -> Iterator[Server]:
    with computing_server(base_of(), homes) as server:
        yield server


def asked(server: Server, **body: Any) -> list[dict[str, Any]]:
    usual = {"model": "llama", "max_tokens": 0, "echo": True, "logprobs": TOP}
    status, _, reply = call(server.url, PATH, usual | {"return_tokens_as_token_ids": True} | body)
    assert status == 200, reply
    return [choice["logprobs"] | {"text": choice["text"]} for choice in reply["choices"]]


def refused(server: Server, **body: Any) -> str:
    usual = {"model": "llama", "prompt": [5, 6], "echo": True, "logprobs": 1}
    status, _, reply = call(server.url, PATH, usual | body)
    assert status == 400, reply
    return f"{reply['error']['param']}: {reply['error']['message']}"


def logs_of(which: str, homes: Any) -> list[torch.Tensor]:
    """Return what the model gives each token that may follow LONG's, in float32 and float64."""
    model = base_of().model
    if which in homes:
        veneer.load(model, homes[which])
    logs = []
    for each in (lambda: model, model.double):
        with torch.no_grad():
            logs.append(each()(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1))
    return logs


@pytest.mark.parametrize("which", ["llama", "wide"])
def test_it_is_what_the_model_gives(server, homes, which):
    (choice,) = asked(server, model=which, prompt=LONG)
    assert choice["tokens"] == [f"token_id:{token}" for token in LONG]
    assert choice["token_logprobs"][0] is None
    assert choice["top_logprobs"][0] is None
    plain, wide = logs_of(which, homes)
    own = torch.tensor(choice["token_logprobs"][1:])
    places = range(len(LONG) - 1)
    assert_no_further(own, plain[places, LONG[1:]], wide[places, LONG[1:]])
    top = wide.topk(TOP)
    likeliest = [[f"token_id:{token}" for token in each] for each in top.indices.tolist()]
    assert [[*each] for each in choice["top_logprobs"][1:]] == likeliest
    values = torch.tensor([[*each.values()] for each in choice["top_logprobs"][1:]])
    assert_no_further(values, plain.gather(1, top.indices), top.values)


@pytest.mark.parametrize("which", ["llama", "dora"])
def test_it_is_to_the_bit_what_decoding_gives_in_any_company(server, which):
    """Behind blocks of the prefix cache, which has no logits of a prompt, too."""
    (alone,) = asked(server, model=which, prompt=LONG)
    (answered,) = asked(server, model=which, prompt=LONG, max_tokens=6, temperature=0)
    assert server.served.engine.stats.cache_bytes > 0
    answer = [int(token.removeprefix("token_id:")) for token in answered["tokens"][len(LONG) :]]
    assert len(answer) == 6
    other, whole = asked(server, model=which, prompt=[SECOND, [*LONG, *answer]])
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert answered[name] == whole[name]
        assert alone[name] == whole[name][: len(LONG)]
    assert len(other["tokens"]) == len(SECOND)


def test_text_and_its_tokens_are_the_same(server):
    text = "Is it 1, 2 or 3?"
    by_text, second = asked(server, prompt=[text, "No."])
    encoded = server.served.tokenizer(text)["input_ids"]
    (by_ids,) = asked(server, prompt=encoded)
    assert by_text == by_ids
    assert (by_text["text"], second["text"]) == (text, "No.")
    (named,) = asked(server, prompt=text, return_tokens_as_token_ids=False)
    assert "".join(named["tokens"]) == text
    assert named["text_offset"] == by_text["text_offset"] == [*range(len(text))]
    assert named["token_logprobs"] == by_text["token_logprobs"]
    (answered,) = asked(server, prompt=text, max_tokens=3, temperature=0, logprobs=0)
    assert answered["text"].startswith(text)
    assert answered["text_offset"][len(text)] == len(text)
    assert answered["top_logprobs"][1:] == [{}] * (len(answered["tokens"]) - 1)


def test_an_echo_without_logprobs_is_a_text_alone(server):
    decoded = server.served.tokenizer.decode([5, 6])
    for prompts, begins in ((["Ah", "Oh!"], ["Ah", "Oh!"]), ([[5, 6]], [decoded])):
        body = {"model": "llama", "prompt": prompts, "echo": True, "n": 2, "max_tokens": 2}
        status, _, reply = call(server.url, PATH, body)
        assert status == 200, reply
        texts = [choice["text"] for choice in reply["choices"]]
        assert [each["logprobs"] for each in reply["choices"]] == [None] * 2 * len(begins)
        for text, begin in zip(texts, [each for each in begins for _ in "12"], strict=True):
            assert text.startswith(begin)
        assert reply["usage"]["completion_tokens"] == 2 * len(texts)


def test_a_prompt_may_fill_the_context_and_no_more(server):
    context = server.served.context
    (choice,) = asked(server, prompt=[5] * context, logprobs=0)
    assert len(choice["tokens"]) == context
    assert "context" in refused(server, prompt=[5] * (context + 1), max_tokens=0)


def test_what_is_not_supported_is_refused_by_name(server, monkeypatch):
    assert "max_tokens: max_tokens 0" in refused(server, max_tokens=0, logprobs=None)
    assert "max_tokens: max_tokens 0" in refused(server, max_tokens=0, echo=False)
    assert "echo: echo is not supported in a stream" in refused(server, stream=True)
    assert "n: With echo and logprobs" in refused(server, n=2)
    assert "logprobs: " in refused(server, logprobs=21)
    text = refused(server, logprobs=None, return_tokens_as_token_ids=True)
    assert text.startswith("return_tokens_as_token_ids: ")
    assert "prompt: The prompt has the token" in refused(server, prompt=[VOCAB])
    monkeypatch.setattr(echo, "MOST_ECHOED", 30)
    assert "prompt: The prompts have 44 tokens" in refused(server, prompt=[[7] * 22] * 2)
    asked(server, prompt=LONG)
