"""vLLM's routes for loading adapters: who may, from where, and what becomes of it."""

import shutil

import pytest

from support.server import ADMIN, API, AS_ADMIN, AS_USER, BASE, call, chat, running, scripted
from veneer.formats.training import ComputedIn
from veneer.serve.config import Keys

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(adapter_dirs, tmp_path):
    return shutil.copytree(adapter_dirs, tmp_path / "adapters")


@pytest.fixture
def server(root):
    served = scripted()
    with running(served, keys=Keys(api=API, admin=ADMIN), loading_root=root) as server:
        server.served = served
        yield server


def load(server, name, path, headers=AS_ADMIN, **more):
    body = {"lora_name": name, "lora_path": str(path), **more}
    return call(server.url, LOAD, body, headers=headers)


def models(server):
    return [m["id"] for m in call(server.url, "/v1/models", headers=AS_USER)[2]["data"]]


def test_an_adapter_comes_and_goes(server, root):
    status, _, text = load(server, "new", "law")
    assert (status, text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert load(server, "other", root / "cooking")[0] == 200  # vLLM's clients name whole paths
    assert models(server) == [BASE, "new", "other"]
    body = chat("new", max_tokens=1)
    assert call(server.url, "/v1/chat/completions", body, headers=AS_USER)[0] == 200
    status, _, text = call(server.url, UNLOAD, {"lora_name": "new"}, headers=AS_ADMIN)
    assert (status, text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert models(server) == [BASE, "other"]
    assert call(server.url, "/v1/chat/completions", body, headers=AS_USER)[0] == 404
    assert call(server.url, UNLOAD, {"lora_name": "new"}, headers=AS_ADMIN)[0] == 404


def test_other_bits_are_said_in_the_log_and_on_the_page(server, root, caplog):
    assert load(server, "same", "law")[0] == 200
    server.served.computed_in = ComputedIn("bfloat16", 4, "nf4")
    assert load(server, "other", "law")[0] == 200
    (says,) = caplog.messages
    assert "The adapter 'other' was trained over its base in 32 bits (float32), and here" in says
    shown = call(server.url, "/api/adapters", headers=AS_USER)[2]["adapters"]
    assert [each["over"] for each in shown] == ["32 bits (float32)"] * 2
    assert shown[0]["note"] == says.replace("The adapter 'other'", "It")


def test_a_name_in_use_is_taken_only_on_purpose(server, root):
    assert load(server, "new", "law")[0] == 200
    status, _, reply = load(server, "new", "cooking")
    assert (status, reply["error"]["param"]) == (400, "lora_name")
    assert server.served.library.info("new").directory.name == "law"
    assert load(server, "new", "cooking", load_inplace=True)[0] == 200
    assert server.served.library.info("new").directory.name == "cooking"
    assert load(server, BASE, "law")[0] == 400


def test_an_adapter_that_cannot_act_is_refused_and_what_was_there_stays(server, monkeypatch):
    from veneer.errors import AdapterError

    assert load(server, "new", "law")[0] == 200

    def refuse(name):
        raise AdapterError("it was made for another base")

    monkeypatch.setattr(server.served.engine, "load", refuse)
    for name, more in (("new", {"load_inplace": True}), ("fresh", {})):
        status, _, reply = load(server, name, "cooking", **more)
        assert (status, reply["error"]["message"]) == (400, "it was made for another base")
    assert models(server) == [BASE, "new"]
    assert server.served.library.info("new").directory.name == "law"


def test_only_the_admin_key_opens_it(server):
    for headers in ({}, AS_USER, {"authorization": ADMIN}, {"authorization": f"Basic {ADMIN}"}):
        status, received, _ = load(server, "new", "law", headers=headers)
        assert (status, received["www-authenticate"]) == (401, "Bearer")
    assert call(server.url, "/v1/models", headers=AS_ADMIN)[0] == 401  # nor is it the other
    assert models(server) == [BASE]


def test_it_is_off_unless_enabled():
    with running(scripted()) as server:
        for path, body in (
            (LOAD, {"lora_name": "a", "lora_path": "b"}),
            (UNLOAD, {"lora_name": "a"}),
        ):
            status, _, reply = call(server.url, path, body)
            assert status == 404
            assert "--enable-lora-loading" in reply["error"]["message"]


def test_links_out_of_the_directory_are_not_followed(server, root, adapter_dirs, tmp_path):
    elsewhere = shutil.copytree(adapter_dirs / "law", tmp_path / "elsewhere")
    (root / "link").symlink_to(elsewhere)
    (root / "half").mkdir()
    for file in elsewhere.iterdir():
        (root / "half" / file.name).symlink_to(file)
    # A run's directory means the adapter in it, which may be a link as well.
    for name, adapter in (("run", root / "law"), ("run of others", elsewhere)):
        (root / name).mkdir()
        (root / name / "lora_adapter").symlink_to(adapter)
    (root / "circle").symlink_to(root / "circle")
    (root / "inside").symlink_to(root / "law")
    for name in ("link", "half", "run of others", "circle", "link/..", elsewhere, "nowhere"):
        status, _, reply = load(server, "new", name)
        assert (status, reply["error"]["param"]) == (400, "lora_path"), name
    assert load(server, "new", "inside")[0] == 200
    assert load(server, "newer", "run")[0] == 200
