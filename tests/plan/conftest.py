"""The sizes of each model, read once for all plans."""

import pytest

import veneer.cli.plan_tables
import veneer.plan.find
from veneer.plan.find import sizes_of
from veneer.plan.sizes import Sizes

SIZES: dict[str, Sizes] = {}


@pytest.fixture(autouse=True)
def _sizes_read_once(monkeypatch):
    """Read the sizes of each configuration once for all plans: no plan changes them, and of the
    largest models they take most of the time."""

    def read_once(config):
        text = config.to_json_string(use_diff=False)
        if text not in SIZES:
            SIZES[text] = sizes_of(config)
        return SIZES[text]

    for module in (veneer.cli.plan_tables, veneer.plan.find):
        monkeypatch.setattr(module, "sizes_of", read_once)
