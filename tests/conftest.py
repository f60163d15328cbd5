"""What holds for all tests, and the small trained model that many of them share."""

import gc
import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from support.thinned import thin

# Importing torch and its like makes millions of objects and no garbage: looking for it takes a
# quarter of the time. `pytest_collection_modifyitems` lets it begin.
gc.disable()

# Nothing here may reach for a hub, whatever a library would like to look up.
os.environ["HF_HUB_OFFLINE"] = "1"

# On models this small a second thread gains nothing, and waiting for it where the processor is
# busy with other things costs tenfold. It also makes sums, here and in child processes, repeat.
os.environ["OMP_NUM_THREADS"] = "1"

# Where there is no card, kernels in Triton are interpreted: it asks when it is first imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tables are as wide here as in any terminal, whatever the tests run in.
os.environ["COLUMNS"] = "120"

# A shared machine may pause at any moment: no test is judged by the clock.
settings.register_profile("no-clock", deadline=None)
settings.load_profile("no-clock")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Run each test in a folder of its own, so that default output paths hit nothing real."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk():
    """Let files be written without waiting until they are on the disk: no machine fails between a
    test's writing and its reading, and thousands of times that takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _few_pictures(request, monkeypatch):
    """Let a run write a file of no content as its loss.png, which else takes a quarter of the time
    of a short run. Tests marked `draws` get the picture; tests/cli/test_plots.py is about it."""
    tune = sys.modules.get("veneer.cli.tune")
    if tune is not None and request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(tune, "draw_losses", lambda lines, path: path.touch())


@pytest.fixture(autouse=True)
def _short_certificates(monkeypatch):
    """Let a run compare its merged model by two rows of the probe, whose sixteen else take a third
    of the time of a short run. tests/adapter/test_certify.py is about all of them."""
    results = sys.modules.get("veneer.training.results")
    if results is None:
        return
    module, certify = sys.modules["veneer.adapter.certify"], results.certify
    probe_rows = module.probe_rows

    def by_two_rows(*models, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "probe_rows", lambda *a, **k: probe_rows(*a, **k)[:2])
            return certify(*models, **options)

    monkeypatch.setattr(results, "certify", by_two_rows)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """Leave cases of thinned tables to the slow proofs, and let the tests that share the trained
    model come first, so that one process makes it while the others run something else."""
    thin(items)
    yield
    gc.enable()
    gc.freeze()
    items.sort(key=lambda item: "minigpt_home" not in item.fixturenames)


def pytest_unconfigure():
    """Let what is left be looked through again if Triton is here, whose bindings report as leaked
    whatever of theirs is not freed when Python ends. It takes seconds, so not elsewhere."""
    if "triton" in sys.modules:
        gc.unfreeze()


@pytest.fixture(scope="session")
def minigpt_home(tmp_path_factory) -> Path:
    """A MiniGPT that was pretrained for long enough to answer in sentences: one for all processes
    of a run."""
    from veneer.training.pretrain import pretrain

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the directory of the whole run, with one for each process
    home = root / "minigpt"
    with FileLock(root / "minigpt.lock"):
        if not home.exists():
            list(pretrain(home, steps=150))
    return home
