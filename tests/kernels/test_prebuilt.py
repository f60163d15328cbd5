"""A wheel's native parts: which is chosen, and what happens where none suits."""

from typing import get_args

import pytest
import torch

from veneer.kernels import compiling, native, prebuilt, published
from veneer.kernels.activation import Activation

ZEN2 = compiling._V3 | {"sse4_2"}
SKYLAKE = ZEN2 | compiling._V4
X86, ARM = ("x86_64", "aarch64")


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Return a function that lets this be another processor, with a wheel that has libraries."""

    def pretend(machine: str, features: frozenset[str]) -> None:
        monkeypatch.setattr(prebuilt.platform, "machine", lambda: machine)
        monkeypatch.setattr(prebuilt, "processor_features", lambda: features)
        monkeypatch.setattr(prebuilt, "DIRECTORY", tmp_path)
        forget()

    def forget() -> None:
        for function in (prebuilt.level_here, native._prebuilt, native.library_of, native._kernel):
            function.cache_clear()

    yield pretend
    monkeypatch.undo()
    forget()


def test_every_activation_is_prebuilt():
    structs = {kind.title().replace("_", "") for kind in get_args(Activation)}
    assert structs == set(compiling.ACTIVATIONS)


def test_every_source_is_prebuilt():
    sources = {path.stem for path in compiling.HERE.glob("*.cpp")}
    assert {source for source, _ in compiling.SOURCES} == sources


@pytest.mark.parametrize(
    ("machine", "features", "level"),
    [
        (X86, SKYLAKE | {"avx512_bf16", "amx_bf16", "amx_tile"}, "avx512bf16"),
        (X86, SKYLAKE, "avx512"),
        (X86, SKYLAKE - {"avx512bw"}, "avx2"),
        (X86, ZEN2, "avx2"),
        (X86, ZEN2 - {"fma"}, ""),
        (ARM, frozenset({"asimd", "fp"}), "neon"),
        ("riscv64", frozenset(), ""),
    ],
)
def test_the_best_level_that_runs_here_is_chosen(machine, features, level, processor):
    processor(machine, features)
    assert prebuilt.level_here()[0] == level
    assert bool(prebuilt.level_here()[1]) == (not level)


def test_without_libraries_nothing_is_missed():
    assert prebuilt.level_here() == ("", "")  # the repository has none
    assert native.why_compiled() == ""


@pytest.mark.parametrize("features", [SKYLAKE, ZEN2 - {"fma"}])
def test_what_does_not_load_is_compiled_and_the_reason_known(features, processor, tmp_path):
    compiled, why_not = native.load()
    processor(X86, features)
    (tmp_path / "native-avx512.so").write_bytes(b"of another machine")
    reason = native.why_compiled()
    assert ("native-avx512.so" in reason) if features == SKYLAKE else ("fma" in reason)
    again, why_not_again = native.load()
    assert (again is None, why_not_again) == (compiled is None, why_not)


@pytest.mark.slow
def test_each_level_that_runs_here_computes_what_the_formulas_do(processor, tmp_path, monkeypatch):
    features = prebuilt.processor_features()
    runs_here = [level for level in compiling.LEVELS[X86] if level.features <= features]
    if not runs_here:
        pytest.skip("this processor runs no level of a wheel for x86-64")
    monkeypatch.setattr(compiling, "SOURCES", (("published", ""),))
    compiling.prebuild("g++", tmp_path, runs_here)
    codes = torch.randint(0, 256, (7, 40), dtype=torch.uint8)
    scales, zeros = torch.rand(7, 5), torch.rand(7, 5)
    for level in runs_here:
        processor(X86, level.features)
        weight = published.by_rows(
            "uint4", codes, scales, zeros, cols=80, group=16, dtype=torch.float32
        )
        formula = published._by_rows("uint4", codes, scales, zeros, 80, 16, 1, None)
        torch.testing.assert_close(weight, formula, rtol=2e-6, atol=2e-6)
        assert native._prebuilt("published", "")[0] is not None
