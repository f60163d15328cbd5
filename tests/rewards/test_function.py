"""A user's function runs in a process of its own, which is ended when it hangs."""

from __future__ import annotations

import io
import json
import os
import select

import pytest

from veneer.errors import ConfigError
from veneer.rewards.function import Function
from veneer.rewards.judged import Answered, RewardFault
from veneer.rewards.worker import load, serve

MODULE = """
from __future__ import annotations

import sys
import time
from dataclasses import dataclass

@dataclass
class Judge:  # which looks for its module
    strict: bool

def brief(completion):
    print("this is no reward")
    return -len(completion)

def right(completion, *, references, **others):
    return float(completion in references) + len(others["messages"])

def cursed(completion):
    if completion == "raise":
        return 1 / 0
    if completion == "exit":
        sys.exit("no more")
    if completion == "read":
        return len(sys.stdin.read())
    if completion == "hang":
        time.sleep(1000)
    if completion == "end":
        import os
        os._exit(3)
    return float("nan") if completion == "nan" else 1.0

def starts(completion):
    import os
    import subprocess
    end = os.open(completion, os.O_WRONLY)
    subprocess.Popen(["sleep", "1000"], pass_fds=[end])
    return 1.0

def needs_more(completion, teacher):
    return 0.0

number = 7
"""


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "judges.py"
    file.write_text(MODULE)
    return str(file)


def replies(spec, *rows):
    out = io.StringIO()
    serve(spec, io.StringIO("".join(json.dumps(row) + "\n" for row in rows)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_function_is_given_what_it_names(module):
    row = {"prompt": "?", "completion": "four", "messages": [{}], "references": ["four"]}
    assert replies(f"{module}:brief", row) == [{"ready": True}, {"reward": -4.0}]
    assert replies(f"{module}:right", row) == [{"ready": True}, {"reward": 2.0}]
    raised = replies(f"{module}:cursed", {**row, "completion": "raise"}, row)
    assert raised[1:] == [{"raised": "ZeroDivisionError: division by zero"}, {"reward": 1.0}]
    exits = replies(f"{module}:cursed", {**row, "completion": "exit"}, row)
    assert exits[1:] == [{"raised": "SystemExit: no more"}, {"reward": 1.0}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brieff", "has no function 'brieff'; did you mean 'brief'?"),
        ("number", "has no function 'number'"),
        ("needs_more", "needs teacher, but a reward function is given what it names of prompt"),
    ],
)
def test_what_cannot_be_called_is_refused(module, name, message):
    (reply,) = replies(f"{module}:{name}")
    assert message in reply["unusable"]


def test_a_module_that_fails_is_refused(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        load(f"{tmp_path}/broken.py:f")


def test_a_process_that_hangs_or_ends_is_replaced(module):
    """What the function prints is no reward either."""
    reward = Function(f"{module}:cursed", seconds=0.2)
    try:
        assert reward.name == "cursed"
        with pytest.raises(RewardFault, match=r"within 0\.2 s") as caught:
            reward(Answered("hang"))
        assert caught.value.kind == "timed out"
        reward.seconds = 60.0  # so that a loaded machine is no fault of the function's
        with pytest.raises(RewardFault, match="ended by itself") as caught:
            reward(Answered("end"))
        assert caught.value.kind == "raised"
        assert reward(Answered("read")) == 0.0  # what it reads is no request
        assert reward(Answered("fine")) == 1.0
    finally:
        reward.close()


def test_what_a_function_has_started_ends_with_its_process(module, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as end:
        reward = Function(f"{module}:starts", seconds=60.0)
        try:
            assert reward(Answered(str(pipe))) == 1.0
        finally:
            reward.close()
        nobody_writes = select.poll()
        nobody_writes.register(end, 0)  # what is always looked for: the other side's end
        assert nobody_writes.poll(60_000)


@pytest.mark.slow
def test_what_a_function_prints_is_no_reward(module):
    reward = Function(f"{module}:brief", seconds=60.0)
    try:
        assert reward(Answered("four")) == -4.0
    finally:
        reward.close()
    with pytest.raises(ConfigError, match="has no function 'bref'; did you mean 'brief'"):
        Function(f"{module}:bref", seconds=60.0)
