"""The command line: what it imports, what it explains, and what it refuses."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from veneer.cli.app import app, run
from veneer.compare.config import CompareConfig
from veneer.training.recipe import Recipe

COMMANDS = [name for name in app if not name.startswith("-")]
HELPS = [["--help"], *([command, "--help"] for command in COMMANDS)]
WITHOUT_MODEL = [
    *HELPS,
    ["--version"],
    ["tune", "--rnk", "4"],
    ["compare", "m", "no.jsonl"],
    ["extract", "a", "b", "c", "--rank", "0"],
    ["tnue"],
]
# Each is run in a fork of a process that has imported nothing else.
RUN_EACH = """
import json, os, sys
from veneer.cli.app import run
for arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        code = run(arguments)
        print(f"\\n{json.dumps([arguments, code, list(sys.modules)])}", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported() -> dict[tuple[str, ...], tuple[int, set[str]]]:
    """The exit code of each command line, and the modules that it has imported."""
    command = [sys.executable, "-c", RUN_EACH, json.dumps(WITHOUT_MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    return {tuple(arguments): (code, set(modules)) for arguments, code, modules in lines}


@pytest.mark.parametrize("arguments", WITHOUT_MODEL)
def test_what_needs_no_model_imports_no_torch(arguments, imported):
    code, modules = imported[tuple(arguments)]
    assert code == (0 if "--help" in arguments or "--version" in arguments else 2)
    heavy = "torch transformers tokenizers gguf numpy pyarrow matplotlib"
    assert not modules.intersection(heavy.split())


def test_python_m_veneer_is_veneer():
    for arguments, code in ((["--help"], 0), (["tune", "m", "d", "--rank", "none"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "veneer", *arguments], capture_output=True, text=True
        )
        assert done.returncode == code
        assert ("tune" in done.stdout) if code == 0 else ("--rank" in done.stderr)


def test_the_commands_are_these():
    models = {"inspect", "plan", "pretrain", "quantize", "tune", "search", "compare"}
    models |= {"generate", "chat", "doctor", "evaluate"}
    adapters = {"diff", "combine", "extract", "merge", "convert", "export", "check", "serve"}
    adapters |= {"verify", "push", "card"}
    assert set(COMMANDS) == models | adapters | {"completion"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_other_command(command, imported):
    _, modules = imported[command, "--help"]
    homes = {app[name].default_command.__module__ for name in COMMANDS}
    assert len(homes & modules) == 1


def test_help_of_all_imports_no_command(imported):
    _, modules = imported["--help",]
    commands = {name for name in modules if name.startswith("veneer.cli.")}
    of_the_line = "app console file_settings recipes several_data whole_numbers"
    assert commands == {f"veneer.cli.{name}" for name in of_the_line.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_and_argument_is_explained(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    assert run([command, "--help"]) == 0
    printed = capsys.readouterr().out
    rows = [line.strip("│ ") for line in printed.splitlines() if re.match(r"│[ *]{1,4}\S", line)]
    beside = ("model", "data", "out", "resume", "force", "quiet")
    compared = len(fields(CompareConfig)) + len(beside)
    switches = ("resume", "force", "ignore_plan", "track", "quiet", "json", "config")
    tuned = len(Recipe("m", Path("d")).settings()) + len(switches)
    flags = {"tune": tuned, "compare": compared, "inspect": 13, "combine": 7, "extract": 8}
    flags |= {"verify": 1, "doctor": 1, "completion": 1}
    assert len(rows) >= flags.get(command, 2)
    assert printed.count("╭") >= {"tune": 8, "search": 7}.get(command, 1)  # headings of flags
    for row in rows:
        name, _, explained = row.lstrip("* ").partition("  ")
        assert re.match(r"[A-Z]+|--[a-z]", name), row
        text = explained.strip()
        assert len(text.split()) >= 2, f"{name} is not explained"
        assert not text.startswith("["), f"{name} is not explained"


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["tune", "m", "d", "--rnk", "4"], "--rank"),
        (["tune", "m", "d", "--tokens-per-stp", "4"], "--tokens-per-step"),
        (["generate", "m", "p", "--temprature", "1"], "--temperature"),
        (["inspect", "m", "--targts", "all"], "--targets"),
        (["tnue", "m", "d"], '"tune"'),
    ],
)
def test_an_unknown_flag_or_command_names_the_nearest(arguments, nearest, refused):
    assert nearest in refused(*arguments)


def test_unknown_keys_of_a_recipe_are_all_named_with_their_nearest(caught, tmp_path, refused):
    settings = {"model": "m", "data": "d", "rnk": 4, "max_lenght": 5, "merge": 1, "config": "x"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    error = refused("tune", "--config", str(recipe))
    assert str(recipe) in error
    assert "'rnk' is unknown; did you mean 'rank'?" in error
    assert "'max_lenght' is unknown; did you mean 'max_length'?" in error
    # Neither the name of a command nor another recipe is passed over.
    assert "'merge' is unknown" in error
    assert "'config' is unknown" in error
    assert caught.recipe is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [m\n", "cannot be read as YAML"),
        ("- model\n", "must hold settings"),
        ("", "must hold settings"),
        ("model: m\ndata: d\nrank: many\n", "rank"),
        ("model: m\ndata: d\nlr: [1, 2]\n", "lr"),
        ("model: m\ndata: d\nrank_pattern: 3\n", "rank_pattern"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(caught, tmp_path, text, says, refused):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    error = refused("tune", "--config", str(path))
    assert says in error
    assert "recipe.yaml" in error
    assert caught.recipe is None


def test_a_recipe_that_does_not_exist_is_named(refused):
    assert "nowhere.yaml" in refused("tune", "--config", "nowhere.yaml")


def test_all_values_that_cannot_be_are_named_at_once(caught, refused):
    wrong = {
        "rank": 0,
        "dropout": 1.0,
        "alpha": -1,
        "lr": 0,
        "epochs": -1,
        "clip": -0.5,
        "tokens-per-step": 0,
        "patience": 0,
        "limit": 0,
        "max-length": 1,
    }
    error = refused("tune", "m", "d", *(f"--{name}={value}" for name, value in wrong.items()))
    for name in wrong:
        assert f"{name.replace('-', '_')} is " in error, name
    error = refused("tune", "m", "d", "--eval-rows", "3", "--eval-data", "x.jsonl")
    assert "eval_rows and eval_data exclude each other" in error
    error = refused("tune", "m", "d", "--eval-every", "3", "--patience", "2", "--eval-rows", "0")
    assert "eval_every and patience would do nothing" in error
    assert caught.recipe is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "four"], "--rank"),
        (["--schedule", "zigzag"], "zigzag"),
        (["--dtype", "int3"], "int3"),
        (["--init", "zeros"], "zeros"),
        (["--lr", "nan"], "lr"),
        (["--epochs", "inf"], "epochs"),
        (["--rank-pattern.(", "4"], "regular expression"),
        (["--rank-pattern.q_proj", "0"], "rank_pattern['q_proj']"),
        (["--empty-targets"], "targets is empty"),
        (["extra"], "extra"),
        (["--rank"], "--rank"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(caught, arguments, says, refused):
    assert says in refused("tune", "m", "d", *arguments)
    assert caught.recipe is None


def test_a_missing_argument_is_named(caught, refused):
    assert "model" in refused("tune").lower()
    assert "data" in refused("tune", "m").lower()


def test_a_long_error_is_not_cut_off(refused):
    flag = "--" + "x" * 300
    assert flag in refused("tune", "m", "d", flag, "1")
