"""`veneer.show` in a notebook and outside of one."""

import math
import re
import sys
from types import SimpleNamespace

import pytest

import veneer
from veneer.cli.show import HEIGHT, POINTS, Curves
from veneer.training.events import Evaluated, Notice, Started, Step, Trained, Verdict

EVENTS = [
    Notice("a <note>"),
    Started(4, 0),
    Evaluated(0, 2.5, 12.0, best=True),
    *(Step(n, 2.0 / n, 1e-3, 100, 40, 0.1, 10**9) for n in range(1, 5)),
    Evaluated(4, 1.0, 2.7, best=True),
    Verdict("learnt", "It fell & stayed."),
    Trained(4, 4),
]


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook was given to show, in a process that seems to be one's kernel."""
    drawn: list[str] = []
    handle = SimpleNamespace(update=drawn.append)

    def display(html, *, display_id):
        assert display_id
        drawn.append(html)
        return handle

    shell = SimpleNamespace(kernel=object())
    module = SimpleNamespace(display=display, HTML=str)
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=module)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    return drawn


def test_in_a_notebook_the_last_picture_has_all_of_the_run(notebook):
    assert veneer.show(iter(EVENTS)) == EVENTS
    last = notebook[-1]
    assert "step 4 of 4, loss 0.5000" in last
    assert "width:100.0%" in last
    assert last.count("<circle") == 2
    assert len(re.search(r'points="([^"]+)"', last)[1].split()) == 4
    assert "a &lt;note&gt;" in last
    assert "learnt: It fell &amp; stayed." in last


def test_what_was_shown_stays_where_a_run_fails(notebook):
    def failing():
        yield from EVENTS[:5]
        raise veneer.TrainingError("no more")

    with pytest.raises(veneer.TrainingError):
        veneer.show(failing())
    assert "step 2 of 4" in notebook[-1]


def test_elsewhere_it_prints_what_tune_prints(capsys):
    assert veneer.show(iter(EVENTS)) == EVENTS
    printed = capsys.readouterr().out
    assert "evaluation loss 1.0000" in printed
    assert "It fell & stayed." in printed


def test_losses_below_0_stay_in_the_picture_and_those_that_are_no_number_are_not_drawn():
    curves = Curves()
    for n, loss in enumerate((-0.5, math.nan, 0.25, math.inf, -0.1), 1):
        curves.take(Step(n, loss, 1e-3, 1, 1, 0.1, 1))
    points = re.search(r'points="([^"]+)"', curves.html())[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 3
    assert 0 < heights[1] < heights[2] < heights[0] < HEIGHT


def test_a_long_run_has_no_more_points_than_a_screen():
    curves = Curves()
    for n in range(1, 10 * POINTS):
        curves.take(Step(n, 1.0, 1e-3, 1, 1, 0.1, 1))
    points = re.search(r'points="([^"]+)"', curves.html())[1].split()
    assert POINTS / 2 < len(points) <= POINTS
