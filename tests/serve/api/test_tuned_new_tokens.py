"""What `veneer tune --new-words` leaves, served over HTTP: as the demo's adapter is."""

import json

import pytest

import veneer
from support.random_adapters import tokenizer
from support.server import call, chat, running
from support.tiny_models import VOCAB, tiny
from veneer.formats.merged import write_model
from veneer.serve.config import ServeConfig
from veneer.serve.run import prepare

NEW, ID = "tharnow", VOCAB + 1
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(tiny("llama"), tokenizer(), home / "base")
    rows = [{"prompt": f"Is it {NEW}?", "completion": f"{NEW} and veneer"}] * 4
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = veneer.Recipe(
        model=str(home / "base"),
        data=str(home / "rows.jsonl"),
        lora=veneer.LoRA(rank=2, targets="all"),
        training=veneer.TrainConfig(steps=2, lr=0.01, save_every=1),
        rows=veneer.DataConfig(eval_rows=0, new_words=f"veneer,{NEW}"),
        dtype="float32",
        out=home / "dist" / "finetuning_results",
    )
    for _ in veneer.tune(recipe):
        pass
    base = veneer.load_base(home / "base", dtype="float32")
    adapters = [
        f"island={recipe.out / 'lora_adapter'}",
        f"earlier={recipe.out / 'checkpoints' / 'step-000002'}",
    ]
    served, notices = prepare(base, adapters, ServeConfig(adapters_dir=home / "dist"))
    assert notices == ()
    assert served.library.names() == ("earlier", "finetuning_results", "island")
    with served.engine, running(served) as server:
        server.vocabulary = len(base.tokenizer)
        yield server


def asked(server, path=CHAT, **body):
    status, _, reply = call(server.url, path, body)
    assert status == 200, reply
    return reply


def test_answers_have_the_new_tokens_and_the_base_has_not(server):
    assert server.vocabulary == VOCAB
    bias = {"logit_bias": {ID: 100}, "max_tokens": 3, "temperature": 0}
    own = asked(server, **chat("island", f"Is it {NEW}?", logprobs=True, top_logprobs=2, **bias))
    (choice,) = own["choices"]
    assert choice["message"]["content"] == NEW * 3
    assert [each["token"] for each in choice["logprobs"]["content"]] == [NEW] * 3
    (choice,) = asked(server, **chat("earlier", **bias))["choices"]
    assert choice["message"]["content"] == NEW * 3
    base = asked(server, **chat("base", f"Is it {NEW}?", max_tokens=3))
    # It is one token for the adapter, and seven for the base.
    assert base["usage"]["prompt_tokens"] - own["usage"]["prompt_tokens"] == len(NEW) - 1
    status, _, reply = call(server.url, CHAT, chat("base", **bias))
    assert (status, reply["error"]["param"]) == (400, "logit_bias")
    body = {"model": "island", "prompt": [5, ID], "max_tokens": 1}
    assert asked(server, "/v1/completions", **body)["usage"]["prompt_tokens"] == 2
    status, _, reply = call(server.url, "/v1/completions", body | {"model": "base"})
    assert (status, reply["error"]["param"]) == (400, "prompt")


def test_the_page_compares_what_has_other_tokens(server):
    body = chat("island", "Is it?") | {"answer": f"so {NEW}."}
    tokens = asked(server, "/api/tokens", **body)["tokens"]
    # A new token counts as all that the base reads it as.
    assert [each["text"] for each in tokens] == ["s", "o", " ", NEW, "."]
    assert tokens[3]["base"] < min(tokens[0]["base"], tokens[4]["base"])
    assert all(each["adapter"] < 0 for each in tokens)


def test_answers_follow_a_form_and_stream_in_the_new_tokens(server):
    more = {"guided_regex": rf"\[{NEW}, (so|no)\]", "logit_bias": {ID: 50}, "temperature": 0}
    (choice,) = asked(server, **chat("island", logprobs=True, **more))["choices"]
    text = choice["message"]["content"]
    assert text in (f"[{NEW}, so]", f"[{NEW}, no]")
    assert NEW in [each["token"] for each in choice["logprobs"]["content"]]
    status, _, stream = call(server.url, CHAT, chat("island", stream=True, **more))
    events = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: {")]
    deltas = [each["delta"].get("content") or "" for event in events for each in event["choices"]]
    assert (status, "".join(deltas)) == (200, text)
