"""What all errors share."""

import pytest

from veneer import errors
from veneer.models.locate import locate
from veneer.plan.find import find_config

KINDS = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]


@pytest.mark.parametrize("kind", [x for x in KINDS if issubclass(x, errors.VeneerError)])
def test_no_full_stop_follows_a_suggestion(kind):
    suggestion = errors.nearest("q_prj", ["q_proj"])
    assert suggestion == "; did you mean 'q_proj'?"
    assert str(kind(f"Nothing is called so{suggestion}.")).endswith("'q_proj'?")
    assert str(kind(f"Nothing{suggestion}. Nor there.")).endswith("'q_proj'? Nor there.")
    assert str(kind("What?... 'a?.b' ends.")) == "What?... 'a?.b' ends."


@pytest.mark.parametrize("find", [locate, find_config])
def test_a_model_whose_name_is_mistyped_is_suggested(find, tmp_path):
    (tmp_path / "merget2").mkdir()  # is none
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(errors.ModelError) as raised:
        find(tmp_path / "merget")
    assert f"; did you mean {str(tmp_path / 'merged')!r}?" in str(raised.value)
