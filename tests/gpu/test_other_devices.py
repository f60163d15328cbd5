"""MPS and XPU: a step runs there on fake tensors, and of operations that MPS has."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import yaml

from gpu.other_devices_cases import STEPS

SAME = {"prim::device"}  # which compute nothing


@cache
def implemented(device: str) -> frozenset[str]:
    """Return the operations that torch has for a device, or for every one, by its own table."""
    spec = importlib.util.find_spec("torchgen")
    assert spec is not None
    table = Path(spec.origin or "").parent / "packaged/ATen/native/native_functions.yaml"
    functions = yaml.load(table.read_text(encoding="utf-8"), yaml.CSafeLoader)
    by_name = {function["func"].partition("(")[0]: function for function in functions}

    def has(function: dict) -> bool:
        if "structured_delegate" in function:
            return has(by_name[function["structured_delegate"]])
        keys = ",".join(function.get("dispatch", {"Composite": ""})).replace(" ", "").split(",")
        return any(key == device or key.startswith("Composite") for key in keys)

    return frozenset(f"aten::{name}" for name, function in by_name.items() if has(function))


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_step_runs_on_the_device(pretend, device, case):
    result = pretend("other_devices_cases", case, "STEPS", device)
    assert result["devices"] == [f"{device}:0"]
    assert result["float64"] == []  # of which MPS has none
    assert (result["packed"], result["fused"]) == (True, 2)
    names = {name for name in result["operations"] if not name.startswith("bitsandbytes::")}
    if device == "mps":
        assert names - SAME - implemented("MPS") == set()


def test_the_table_tells_what_mps_has_from_what_it_has_not():
    assert {"aten::mm", "aten::add.Tensor", "aten::_fused_adamw_"} <= implemented("MPS")
    assert "aten::_flash_attention_forward" not in implemented("MPS")
