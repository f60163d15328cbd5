"""The soak finds what it looks for, and a server holds out for a moment of it."""

import io
from dataclasses import replace

import pytest
from bench import soak
from bench.soak_server import Held


def judged(*faults, growth=0.0, cached=0.0, more=0, status=200, failures=0):
    findings = soak.Findings()
    findings.add("ask", status)
    for fault in faults:
        findings.add("ask", 200, fault)
    early = soak.Sample(0, Held(10**8, 10, 9, sockets=2), 0)
    late = Held(int(1e8 + growth + cached), 20 + more, 9, sockets=12)
    samples = [replace(early, seconds=i) for i in range(51)]
    samples += [soak.Sample(i, late, cached) for i in range(51, 101)]
    out = io.StringIO()
    return soak.verdict(samples, findings, failures, out), out.getvalue()


def test_what_is_wrong_is_seen():
    assert judged(growth=40e6)[0]
    assert judged(growth=10e6, cached=5e8)[0]  # caches may grow
    assert judged(status=429)[0]
    assert not judged(growth=60e6)[0]
    assert judged(more=2)[0]
    assert not judged(more=9)[0]
    assert not judged(failures=1)[0]
    assert not judged(status=503)[0]
    good, text = judged("the answer was another")
    assert not good
    assert "FAULT" in text
    assert "the answer was another" in text


@pytest.mark.slow
def test_a_server_holds_out(tmp_path):
    table = tmp_path / "table.txt"
    status = soak.main(["--minutes", "0.4", "--requests-per-second", "16", "--out", str(table)])
    text = table.read_text()
    assert status == 0, text
    assert all(what in text for what in ("schema", "tool (stream)", "bad: noise", "replace", "job"))
