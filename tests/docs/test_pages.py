"""The pages do what they say: each block of code is run as it stands, and each flag exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import veneer
from support.pages import DOCS, ROOT, Reader, blocks, pages, programs, stand_in, veneer_lines
from veneer.cli.app import app

FIRST = DOCS / "tutorials" / "first-adapter.md"
# Pages whose every block is run. The guides are looked up, not followed: their flags are checked.
FOLLOWED = [
    page
    for folder in ("tutorials", "how-to", "explanation")
    for page in sorted((DOCS / folder).glob("*.md"))
    if any(block.runs for block in blocks(page))
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return stand_in(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture
def reader(packages, tmp_path, monkeypatch) -> Reader:
    """A reader for whom smollm2-135m is a tiny model, in a folder of its own."""
    monkeypatch.syspath_prepend(str(packages))
    place = tmp_path / "reader"
    place.mkdir()
    monkeypatch.chdir(place)
    with programs(tmp_path / "programs", packages) as environment:
        return Reader(environment)


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, reader):
    reader.read(page)
    assert reader.ran >= sum(block.runs for block in blocks(page)) > 0


def test_what_is_not_run_says_why():
    unrun = [
        (page.name, block.line)
        for page in FOLLOWED
        for block in blocks(page)
        if block.language in ("sh", "python") and not block.runs
        if not re.fullmatch(r"not run: \S.*", block.mark)
    ]
    assert unrun == []


def test_every_command_in_every_page_has_the_flags_that_it_names():
    flags = {
        name: {
            flag for argument in app[name].assemble_argument_collection() for flag in argument.names
        }
        for name in app
        if not name.startswith("-")
    }
    commands = {other: name for name in flags for other in app[name].name}
    seen, wrong = 0, []
    for page in pages():
        for command, *words in veneer_lines(page):
            if command not in commands:
                wrong.append(f"{page.relative_to(ROOT)}: veneer {command}")
                continue
            seen += 1
            for word in words:
                flag = word.split("=")[0].split(".")[0]  # --lr.NAME of compare
                known = flags[commands[command]] | {"--help"}
                if flag.startswith("--") and flag not in known:
                    wrong.append(f"{page.relative_to(ROOT)}: veneer {command} {flag}")
    print(f"{seen} commands")
    assert wrong == []
    assert seen > 100


def test_what_explains_a_command_is_a_comment_to_the_shell():
    line = re.compile(r"^ *(?:veneer|make|pip|python -m) \S.*\S {3,}[^#\s].*$", re.MULTILINE)
    pasted = [
        f"{page.relative_to(ROOT)}: {command}"
        for page in pages()
        for command in line.findall(page.read_text(encoding="utf-8"))
    ]
    assert pasted == []


@pytest.mark.slow
def test_the_python_of_the_readme_merges_what_is_learnt(reader):
    Path("rows.jsonl").write_text('{"prompt": "What is tharnow?", "completion": "A stew."}\n')
    reader.read(ROOT / "README.md")
    assert reader.ran == 1
    base, plain = reader.names["base"], reader.names["plain"]
    tokens = base.tokenizer("What is", return_tensors="pt").input_ids
    veneer.use(base.model, None)
    with torch.no_grad():
        assert not torch.equal(plain(tokens).logits, base.model(tokens).logits)


def test_the_family_s_figures_are_those_of_the_comparison():
    def rows(name: str) -> dict[str, list[str]]:
        lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in cells if len(row) > 4}

    measured, shown = rows("comparison.md"), rows("explanation/family.md")
    methods = set(shown) & {"full", "freeze", "lora", "qlora", "dora", "lora+", "prefix", "prompt"}
    assert len(methods) == 8
    for method in methods:
        assert set(shown[method]) <= set(measured[method])


def test_figures_are_what_their_command_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site"))
    import figures

    try:
        for name, figure in figures.figures().items():
            assert (DOCS / "explanation" / name).read_text(encoding="utf-8") == figure
    finally:
        del sys.modules["figures"]


def test_how_many_blocks_there_are(capsys):
    counts = {page.relative_to(DOCS): [b for b in blocks(page) if b.runs] for page in FOLLOWED}
    total = sum(map(len, counts.values()))
    with capsys.disabled():
        print(f"\n{total} blocks of code in {len(counts)} pages run")
    assert total > 50


@pytest.mark.slow
def test_the_first_tutorial_teaches_the_real_base(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # the blocks write rows and results where they run
    with programs(tmp_path / "programs", ROOT / "src") as environment:
        Reader(environment).read(FIRST)
    asked = capfd.readouterr().out.rpartition("Verdict")[2]
    assert "barley" in asked
