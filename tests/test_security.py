"""What docs/security.md promises of the sources, beyond ruff's own rules."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))
ONLY = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False}
# Reads of a pickle unless it is said that it must be none.
MUST_SAY = {"torch.load": "weights_only"}
WORDS = (*ONLY, *MUST_SAY)  # without any of them a module need not be parsed


def faults(source: str) -> list[str]:
    """Return what lets foreign bytes run, in a module."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            needed = MUST_SAY.get(ast.unparse(node.func))
            if needed is not None and needed not in given:
                wrong.append(f"{node.lineno}: {ast.unparse(node.func)} without {needed}")
        elif isinstance(node, ast.Dict):
            given = {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
        else:
            continue
        wrong += [
            f"{node.lineno}: {name} is not {only}"
            for name, only in ONLY.items()
            if name in given
            and not (isinstance(given[name], ast.Constant) and given[name].value is only)
        ]
    return wrong


def test_nothing_foreign_runs_or_is_unpickled():
    texts = {str(path): path.read_text(encoding="utf-8") for path in SOURCES}
    texts = {name: text for name, text in texts.items() if any(word in text for word in WORDS)}
    assert texts
    lines_of = {name: faults(text) for name, text in texts.items()}
    assert not {name: lines for name, lines in lines_of.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=asked)",
        "options = {'trust_remote_code': True}",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_rule_notices(line):
    assert len(faults(line)) == 1
