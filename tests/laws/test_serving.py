"""An adapter is listed and answers, or it is not listed, and whoever asks for it hears why."""

from dataclasses import replace

import pytest

import veneer
from support.kinds import CORE, KINDS, is_first_of
from support.random_adapters import NEW_TOKENS, tokenizer
from support.server import call, chat, running
from support.serving_bases import base_of
from support.thinned import thinned
from veneer.adapter.new_tokens import extend_tokenizer
from veneer.errors import ModelError
from veneer.serve.config import ServeConfig
from veneer.serve.engine.engine import Engine
from veneer.serve.run import prepare

CHAT = "/v1/chat/completions"
# Which change more than embedding, head and the biases of linear layers: norms, for one.
ALL_ROWS = ("saved norms and an mlp", "all at once", "saved and biases")
NORM_BIASES = ("bias all, phi",)
SERVED = [kind for kind in KINDS if is_first_of(kind, "name") and kind.reads_tokens]


def base_named(kind):
    return kind.architecture, kind.bits, kind.on_disk, kind.published


BASES = list(dict.fromkeys(map(base_named, SERVED)))


def test_a_base_that_keeps_more_than_keys_and_values_is_refused():
    for architecture in ("mamba", "mamba2", "falcon_h1"):
        with pytest.raises(ModelError, match="Only models that keep keys and values"):
            Engine(base_of(architecture))


def is_served(kind):
    return not (kind.replaces_weights or kind.name in ALL_ROWS or str(kind) in NORM_BIASES)


def named(kind):
    return kind.name.replace(" ", "_").replace(",", "").replace("+", "_plus")


@pytest.mark.parametrize(
    "of",
    thinned(
        BASES,
        lambda of: any(base_named(kind) == of and str(kind) in CORE for kind in SERVED),
    ),
    ids=str,
)
def test_each_kind_is_served_or_refused_with_the_reason(of, tmp_path):
    kinds = [kind for kind in SERVED if base_named(kind) == of]
    for kind in kinds:
        ours = tokenizer()
        if kind.new_tokens:
            extend_tokenizer(ours, NEW_TOKENS)
        model = kind.shaken()
        veneer.save(
            model, tmp_path / named(kind), name=next(iter(veneer.in_use(model))), tokenizer=ours
        )
    base = replace(base_of(model=kinds[0].base()), name="some/base")
    served, notices = prepare(base, (), ServeConfig(adapters_dir=tmp_path))
    with served.engine, running(served) as server:
        listed = {model["id"] for model in call(server.url, "/v1/models")[2]["data"]}
        page = {a["name"]: a.get("error") for a in call(server.url, "/api/adapters")[2]["adapters"]}
        for kind in kinds:
            name = named(kind)
            assert (name in listed) == is_served(kind), kind
            status, _, reply = call(server.url, CHAT, chat(name, max_tokens=2))
            if name in listed:
                assert status == 200, (kind, reply)
                assert page[name] is None
                continue
            why = reply["error"]["message"]
            assert (status, reply["error"]["param"]) == (400, "model"), kind
            assert (page[name], notices.count(why)) == (why, 1)
            assert "veneer merge BASE" in why
            assert call(server.url, CHAT, chat(name, stream=True))[0] == 400
