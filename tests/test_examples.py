"""The examples run, and do what they say."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

from support import warm

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


def test_every_benchmark_finds_what_it_imports(tmp_path):
    names = sorted(path.stem for path in (EXAMPLES.parent / "bench").glob("[a-z]*.py"))
    code = "from importlib import import_module\n" + "".join(
        f"import_module('bench.{name}')\n" for name in names
    )
    script = tmp_path / "all.py"
    script.write_text(code)
    subprocess.run([warm.executable(), str(script)], cwd=EXAMPLES.parent, check=True)
