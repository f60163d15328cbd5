"""What tests of the server share."""

import pytest

from support.random_adapters import shake
from support.server import running, scripted
from support.tiny_models import tiny
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.formats.adapters import save


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory):
    """Two adapters over the tiny llama, as directories."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("cooking", "law")):
        model = attach(tiny("llama"), LoRA(rank=2 + seed, targets="attention"))
        training = {"system": "Be just."} if name == "law" else None
        save(shake(model, seed=seed), root / name, training=training)
    return root


@pytest.fixture(scope="session")
def two(adapter_dirs):
    return {name: adapter_dirs / name for name in ("cooking", "law")}


@pytest.fixture
def server(two):
    """A server with an engine that computes nothing, and two adapters."""
    with running(served := scripted(two)) as server:
        server.served = served
        yield server
