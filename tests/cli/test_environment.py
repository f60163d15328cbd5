"""What a command says to libraries before they start: only there, and never against the user."""

import os
import platform
import subprocess
import sys

import pytest

from veneer.cli import SPINS, expand_segments

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
X86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="set on x86 processors alone"
)
COMMAND = """
import contextlib, os, sys
from veneer.cli import main
with contextlib.suppress(SystemExit):
    main(["--version"])
print(os.environ.get("PYTORCH_ALLOC_CONF"))
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", *ALLOCATOR)
    others = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=others | environment,
    )


@X86
def test_a_command_says_so_before_torch_is_imported():
    allocator, threads = child(COMMAND).stdout.splitlines()[-2:]
    assert threads == f"{SPINS} False"
    assert allocator == ("expandable_segments:True" if sys.platform == "linux" else "None")


@pytest.mark.parametrize("name", ALLOCATOR)
def test_the_users_allocator_stays(name, monkeypatch):
    for each in ALLOCATOR:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    expand_segments()
    assert {each: os.environ[each] for each in ALLOCATOR if each in os.environ} == {
        name: "max_split_size_mb:64"
    }


@X86
def test_torchs_threads_heed_it():
    code = "from veneer.cli import sleep_while_waiting as f; f(); import torch; torch.ones(1) + 1"
    shown = child(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("this torch has another runtime than GNU's")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in shown


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_what_the_user_has_chosen_stays(chosen, spins):
    assert child(COMMAND, **chosen).stdout.splitlines()[-1] == f"{spins} False"


def test_importing_veneer_sets_nothing():
    code = "import os; before = dict(os.environ); import veneer; print(before == dict(os.environ))"
    assert child(code).stdout.strip() == "True"
