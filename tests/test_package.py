"""The package as a whole: its public names, what importing it costs, and its own promises."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from importlib import import_module, metadata
from pathlib import Path

import pytest

import veneer

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_the_public_names_are_sorted_and_each_resolves():
    assert list(veneer.__all__) == sorted(set(veneer.__all__))
    assert set(veneer.__all__) == set(veneer._HOMES)
    for name in veneer.__all__:
        home = import_module(f"veneer.{veneer._HOMES[name]}")
        assert getattr(veneer, name) is getattr(home, name)
        assert getattr(veneer, name).__module__ == home.__name__
        assert (getattr(veneer, name).__doc__ or "").strip()
    assert list(veneer._HOMES) == list(veneer.__all__)


def test_what_type_checkers_see_is_what_runs():
    tree = ast.parse(Path(veneer.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname is None
            seen[alias.name] = node.module.removeprefix("veneer.")
    assert seen == veneer._HOMES


def test_an_unknown_name_is_an_attribute_error_that_names_the_nearest():
    with pytest.raises(AttributeError, match=r"'no_such_name'$"):
        veneer.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'load_base'"):
        veneer.load_bas  # noqa: B018


def test_dir_shows_the_public_names():
    assert set(veneer.__all__) <= set(dir(veneer))
    assert not [
        name for name in dir(veneer) if not name.startswith("_") and name not in veneer.__all__
    ]


def test_importing_the_package_imports_nothing_large():
    code = (
        "import sys, veneer, veneer.errors\n"
        "from veneer import LoRA, TrainConfig, DataConfig, Recipe, Sampling, VeneerError\n"
        "heavy = {'torch', 'transformers', 'numpy', 'cyclopts', 'rich', 'yaml', 'gguf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_the_installed_one():
    done = subprocess.run(
        [sys.executable, "-m", "veneer", "--version"], capture_output=True, text=True, check=True
    )
    assert metadata.version("veneer") in done.stdout


def test_no_source_leaves_work_for_later():
    marks = re.compile(rf"\b(?:{'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' * 3))})\b")
    left = [path for path in SOURCES if marks.search(path.read_text(encoding="utf-8"))]
    assert left == []


# Names that do not say what they are the name of.
EMPTY_NAMES = {"found", "told", "said", "aside", "room", "put", "part", "parts"}


def test_every_name_says_what_it_names():
    empty = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
        for path in SOURCES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        if token.type == tokenize.NAME
        and token.string in EMPTY_NAMES
        and "field.parts" not in token.line  # gguf-py's own name
        and "def put(self, value" not in token.line  # that of transformers' streamers
        and "streamer.put(" not in token.line  # and so
        and "results.put(" not in token.line  # that of Python's queues
    ]
    assert empty == []


def test_no_docstring_holds_lines_of_code():
    code = re.compile(
        r"= (?:self\.|not )|\bself\.\w+\(|^\s*(?:if|for|with|elif|else)\b.*:$|[<>]{4}"
    )
    pasted = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for line in (ast.get_docstring(node) or "").splitlines()
        if code.search(line)
    ]
    assert pasted == []


def test_every_make_command_of_the_readme_is_in_the_makefile():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", readme))
    assert named
    assert named <= targets


def test_every_veneer_command_of_the_readme_is_one():
    from veneer.cli.app import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?veneer ([a-z]+)", readme, re.MULTILINE))
    assert named <= set(app)
