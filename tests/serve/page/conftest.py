"""One browser for all tests of the page, and servers that it shows."""

import shutil

import pytest

from support.browser import launched
from support.jobs import training
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model


@pytest.fixture(scope="session")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def training_site(tmp_path, two):
    """A server that pretends to train; a job waits after the step that the file `wait` has."""
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    with training(tmp_path / "runs", base=str(tmp_path / "base")) as server:
        shutil.copytree(two["cooking"], tmp_path / "runs" / "result")
        (tmp_path / "runs" / "wait").write_text("2")
        server.wait = tmp_path / "runs" / "wait"
        yield server
