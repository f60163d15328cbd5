"""Parsers of foreign bytes end on all inputs that are kept as they must on any."""

import os
import signal

import pytest

from fuzz.findings import Findings, listed
from fuzz.target import NAMES, corpus, judge, target
from support.endings import stop

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _stopping():
    before = signal.signal(signal.SIGPROF, stop)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs(name, tmp_path):
    chosen = target(name)
    inputs = [*chosen.seeds(), *(path.read_bytes() for path in corpus(name))]
    ends = [judge(chosen, data, tmp_path) for data in inputs]
    assert [wrong for _, wrong in ends if wrong is not None] == []
    # Not all are refused, for then nothing would have been read.
    assert "loaded" in {end for end, _ in ends}


def test_of_each_place_in_the_code_the_shortest_input_is_kept(tmp_path):
    findings = Findings(tmp_path)
    for data, line in ((b"long", 7), (b"b", 7), (b"longer", 7), (b"c", 8)):
        wrong = f'File "/x/src/veneer/files.py", line {line}, in f\nKeyError: {data!r}'
        findings.add(data, "crash", wrong)
    kept = [path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".txt"]
    assert sorted(kept) == [b"b", b"c"]
    assert sorted(line.rpartition(", ")[2] for line in listed(tmp_path)) == [
        "KeyError: b'b'",
        "KeyError: b'c'",
    ]
