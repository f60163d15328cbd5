"""Facts of a machine that does not tell all."""

from veneer.doctor import facts


def test_a_machine_may_say_nothing_of_its_load(monkeypatch):
    def unobtainable():
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr("os.getloadavg", unobtainable)
    assert facts.facts().load is None
    monkeypatch.delattr("os.getloadavg")
    assert facts.facts().load is None
