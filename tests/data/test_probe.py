"""The sample of general English, on which models are compared."""

from veneer.data.probe import GENERAL
from veneer.data.sources import read_rows


def test_the_sample_of_general_english_ships():
    rows, problems = read_rows(GENERAL)
    assert not problems
    assert len(rows) == 60
    assert 2000 < sum(len(row.value.text.split()) for row in rows) < 3000
