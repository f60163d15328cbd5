"""The adapter cache holds what is served, and nothing that was replaced or removed."""

import errno
from pathlib import Path
from typing import Any

import pytest

import veneer
from support.random_adapters import shake
from support.serving_bases import PROMPT, base_of, write_adapter
from support.tiny_models import tiny
from veneer.errors import AdapterError
from veneer.generate.sampling import Sampling
from veneer.serve.engine import adapter_cache
from veneer.serve.engine.adapter_cache import AdapterCache
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig, Request

SMALL = EngineConfig(slots=2, chunk=16)


def test_replaced_and_removed_adapters_leave_memory(tmp_path):
    homes = {
        name: write_adapter(tmp_path / name, "llama", seed=seed, rank=2)
        for seed, name in enumerate(("plain", "other"))
    }
    library = Library(homes)
    sampling = Sampling(max_new_tokens=30)
    with Engine(base_of(), library, EngineConfig(slots=2, chunk=16)) as engine:
        expected = engine.submit(Request(PROMPT, "plain", sampling)).result().tokens
        engine.submit(Request(PROMPT, {"plain": 0.5, "other": 0.5}, sampling)).result()
        assert len(engine.stats.resident) == 3
        stream = engine.submit(Request(PROMPT, "plain", sampling))
        first = stream.next()  # it goes on with what it began with
        library.add("plain", homes["other"])
        library.remove("other")
        engine.load("plain")
        assert engine.stats.resident == ("plain",)
        assert (
            engine.stats.resident_bytes
            == engine.adapters.get(((library.info("plain"), 1.0),)).nbytes
        )
        assert (*first.tokens, *stream.result().tokens) == expected


def test_contents_differ_where_any_number_does(tmp_path):
    """For the prefix cache knows adapters by them alone."""
    homes = {}
    for seed in (0, 2):
        homes[f"lora {seed}"] = write_adapter(tmp_path / f"l{seed}", "llama", seed=seed, rank=2)
        for method in ("prompt", "prefix"):
            model = veneer.attach(tiny("llama"), veneer.Method(method, virtual_tokens=3))
            homes[f"{method} {seed}"] = tmp_path / f"{method}{seed}"
            veneer.save(shake(model, seed=seed), homes[f"{method} {seed}"])
    library, cache = (
        Library({**homes, "again": homes["lora 0"]}),
        AdapterCache(tiny("llama"), 2**30),
    )
    content = {name: cache.get(((library.info(name), 1.0),)).content for name in library.names()}
    assert content.pop("again") == content["lora 0"]
    assert len({*content.values()}) == len(homes) == 6


@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("shapes_only", [True, False])
def test_a_fault_of_the_system_is_none_of_the_adapter(method, shapes_only, tmp_path, monkeypatch):
    """No adapter is refused for good, or taken for the base, because file handles ran out once."""
    own, faults = adapter_cache.read, [OSError(errno.EMFILE, "Too many open files")]

    def read(directory: Path, model: Any, **options: Any) -> Any:
        if options["shapes_only"] == shapes_only and faults:
            raise AdapterError(f"{directory} cannot be read.") from faults.pop()
        return own(directory, model, **options)

    kind = veneer.LoRA(rank=2) if method == "lora" else veneer.Method(method, virtual_tokens=3)
    veneer.save(shake(veneer.attach(tiny("llama"), kind)), tmp_path / "adapter")
    each = Request(PROMPT, "one", Sampling(max_new_tokens=8))
    answers = []
    for is_patched in (False, True):
        if is_patched:
            monkeypatch.setattr(adapter_cache, "read", read)
        with Engine(base_of(), Library({"one": tmp_path / "adapter"}), SMALL) as engine:
            if is_patched:
                with pytest.raises(OSError, match="Too many open files"):
                    raise engine.submit(each).result().error  # that of what is loaded
            answers.append(engine.submit(each).result().tokens)
    assert not faults
    assert answers[0] == answers[1]
