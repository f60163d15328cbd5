"""What all errors share."""

import pytest

from veneer import errors

KINDS = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]


@pytest.mark.parametrize("kind", [x for x in KINDS if issubclass(x, errors.VeneerError)])
def test_no_full_stop_follows_a_suggestion(kind):
    suggestion = errors.nearest("q_prj", ["q_proj"])
    assert suggestion == "; did you mean 'q_proj'?"
    assert str(kind(f"Nothing is called so{suggestion}.")).endswith("'q_proj'?")
    assert str(kind(f"Nothing{suggestion}. Nor there.")).endswith("'q_proj'? Nor there.")
    assert str(kind("What?... 'a?.b' ends.")) == "What?... 'a?.b' ends."
