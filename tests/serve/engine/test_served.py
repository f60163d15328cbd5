"""How likely an answer is by the base and by an adapter that has other tokens."""

import pytest

from support.server import scripted


@pytest.fixture
def compare(monkeypatch):
    """Return what compares an answer, given its tokens as the base has them and as an adapter."""

    def compared(answer, **tokens):
        served = scripted()
        monkeypatch.setattr(served, "chat_tokens", lambda messages, which: [9, 9])
        monkeypatch.setattr(
            served,
            "spans",
            lambda text, which: [(5, piece) for piece, _ in tokens[which or "base"]],
        )
        monkeypatch.setattr(
            served.engine,
            "score",
            lambda read, which: (None, -100.0, *(score for _, score in tokens[which or "base"])),
        )
        return list(served.compared([], answer, "adapter"))

    return compared


def test_tokens_count_once_between_places_where_both_have_an_end(compare):
    # A character of two tokens is the first one's; the second has no text.
    base = [("é", -1.0), ("", -2.0), (" th", -4.0), ("ar", -8.0), (".", -16.0)]
    own = [("é", -3.0), ("", -5.0), (" thar", -7.0), (".", -11.0)]
    expected = [("é", -3.0, -8.0), (" thar", -12.0, -7.0), (".", -16.0, -11.0)]
    assert compare("é thar.", base=base, adapter=own) == expected


def test_all_of_an_answer_counts_where_only_its_end_is_common(compare):
    base, own = [("", -1.0), ("a", -2.0), ("bc", -4.0)], [("ab", -3.0), ("c", -5.0)]
    assert compare("abc", base=base, adapter=own) == [("abc", -7.0, -8.0)]
    assert compare("", base=[], adapter=[]) == []
