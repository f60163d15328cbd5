"""The examples run, and do what they say."""

import importlib.util
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
