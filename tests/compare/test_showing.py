"""What a comparison looks like while it runs, and its picture."""

from matplotlib import pyplot
from matplotlib.transforms import Bbox

from support.comparison_jobs import job
from support.screen import Screen
from veneer.cli import compare as showing
from veneer.cli.console import Terminal
from veneer.compare.events import ComparisonStarted, JobDone, JobFailed, JobStep
from veneer.compare.job import Result
from veneer.compare.labels import LABELS
from veneer.compare.picture import extents, name_points


def test_on_a_terminal_one_table_shows_the_state_of_each_run(monkeypatch):
    shown = Screen()
    terminal = Terminal(file=shown, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(showing, "OUTPUT", terminal)
    first, second, third = (job(name=n, label=LABELS[n], steps=9) for n in ("lora", "full", "dora"))
    result = Result({}, 10, "float32", 5, 2, 100.0, 1.25, exact=50.0)
    with showing.CompareDisplay() as display:
        display.show(ComparisonStarted(("lora", "full", "dora", "prefix"), (0,)))
        display.show(JobDone(first, result, False))
        display.show(JobStep(second, 3, 2.5, 1234.0, 2_000_000_000))
        display.show(JobFailed(third, "no [luck]"))
        terminal.print(display._table())
    lines = [line for line in shown.getvalue().splitlines() if line.strip()]
    *_, lora = (line for line in lines if line.startswith("lora "))
    *_, full = (line for line in lines if line.startswith("full "))
    assert "seed 0: done" in lora
    assert "1.2500" in lora
    assert "50.0" in lora
    assert all(text in full for text in ("seed 0: step 3/9", "2.500", "1,234", "2.0 GB"))
    assert any(line.startswith("dora ") and "failed" in line for line in lines)
    assert any(line.startswith("prefix ") and "waiting" in line for line in lines)


def test_the_names_in_the_picture_cover_neither_points_nor_each_other():
    figure, axes = pyplot.subplots(figsize=(5, 4))
    places = [(1.0, 1.0)] * 4 + [(1.01, 1.0), (1.0, 1.02), (3.0, 4.0)]
    for x, y in places:
        axes.plot(x, y, "o")
    axes.margins(0.2)
    figure.draw_without_rendering()
    name_points([(axes, x, y, f"name {i}") for i, (x, y) in enumerate(places)], axes, figure)
    boxes = [Bbox.from_extents(extents(t, figure.canvas.get_renderer())) for t in axes.texts]
    assert len(boxes) == len(places)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*axes.transData.transform(place)) for place in places)
    pyplot.close(figure)
