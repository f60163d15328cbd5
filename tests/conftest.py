"""What holds for all tests."""

import os

import pytest
from hypothesis import settings

# Nothing here may reach for a hub, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shared machine may pause at any moment: no test is judged by the clock.
settings.register_profile("no-clock", deadline=None)
settings.load_profile("no-clock")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Run each test in a folder of its own, so that default output paths hit nothing real."""
    monkeypatch.chdir(tmp_path)
