"""Whatever call of the disk fails, and wherever a command is killed: what was whole stays whole,
nothing half-written is read as whole, and the command says in one line what to do."""

from collections import Counter

import pytest

from support.faults import NONE, POINTS, SUFFERS, Case, Fault
from support.faulty_commands import NAMES, commands

REPLACING = "convert, replacing"
A_FEW = (("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EIO"), ("any", "kill"))


def one_fault(case: Case, kind: str, effect: str) -> Fault:
    """Return a fault of a call that comes when much is written and nothing has its name yet."""
    count = case.undisturbed.counts[kind]
    # The first write tries whether there can be any; the last renaming is the directory's.
    return Fault(kind, effect, {"rename": count, "write": 2}.get(kind, 3 * count // 4))


@pytest.fixture(scope="module")
def replacing(inputs, tmp_path_factory) -> Case:
    return Case(commands(inputs)[REPLACING], tmp_path_factory.mktemp("replacing"))


def try_all(case: Case, faults: list[Fault], record) -> None:
    """Let each fault happen, note how many there were of each kind, and fail on any violation."""
    points = dict(Counter(fault.kind for fault in faults))
    violations = [wrong for fault in faults if (wrong := case.violation(fault)) is not None]
    record(POINTS, {"command": case.command.name, "points": points})
    shown = "\n".join(violations[:5])
    assert not violations, f"{len(violations)} of {len(faults)} faults, such as\n{shown}"


@pytest.mark.parametrize("faults", [A_FEW[::3], pytest.param(A_FEW, marks=pytest.mark.slow)])
def test_a_command_under_a_few_faults(faults, replacing, record_property):
    try_all(replacing, [one_fault(replacing, *fault) for fault in faults], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUFFERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_fault(name, kind, inputs, tmp_path, record_property):
    case = Case(commands(inputs)[name], tmp_path)
    try_all(case, [fault for fault in case.faults() if fault.kind == kind], record_property)


def test_calls_are_counted_and_the_kth_is_hit(replacing):
    case, counts = replacing, replacing.undisturbed.counts
    assert counts["any"] == sum(n for kind, n in counts.items() if kind != "any")
    assert min(counts["open"], counts["write"], counts["fsync"], counts["rename"]) > 0
    assert case.run(NONE).counts == counts  # the same calls each time
    outcome = case.run(Fault("rename", "EIO", 1))
    assert (outcome.hits, outcome.counts["rename"] > 0) == (1, True)
    assert str(case.disk) in outcome.where
    assert case.run(Fault("any", "kill", 3)).code == -9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "name", "kind", "effect", "shown"),
    [
        ("says nothing", REPLACING, "write", "ENOSPC", "exit code 0, but"),
        ("explains nothing", "convert to peft", "write", "ENOSPC", "a traceback"),
        ("removes first", REPLACING, "rename", "EIO", "out is gone"),
        ("cleans nothing", REPLACING, "write", "EIO", "left behind"),
        ("clears nothing", REPLACING, "any", "kill", "left behind after a second try"),
    ],
)
def test_bugs_are_found(bug, name, kind, effect, shown, inputs, tmp_path, monkeypatch):
    case = Case(commands(inputs)[name], tmp_path)
    fault = one_fault(case, kind, effect)
    assert case.violation(fault) is None
    case.seen.clear()
    monkeypatch.setenv("FAULTY_BUG", bug)
    assert shown in (case.violation(fault) or "")
