"""The examples run, and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_classifier_by_transformers_trainer(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = example("classifier").main()
    assert right > 0.9
    assert "parameters train" in capsys.readouterr().out
    assert Path("dist/classifier/merged/model.safetensors").is_file()


def test_every_benchmark_finds_what_it_imports():
    names = sorted(path.stem for path in (EXAMPLES.parent / "bench").glob("[a-z]*.py"))
    code = "from importlib import import_module\n" + "".join(
        f"import_module('bench.{name}')\n" for name in names
    )
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES.parent, check=True)
