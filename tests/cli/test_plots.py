"""loss.png: its smooth line, and its numbers."""

import pytest

from veneer.cli.plots import draw_losses, smoothed


def test_smoothing_is_centred():
    assert smoothed([]) == []
    assert smoothed([2.0]) == [2.0]
    line = [float(i) for i in range(21)]
    assert smoothed(line)[10] == pytest.approx(10)  # a trailing mean would lag behind
    peak = smoothed([0.0] * 10 + [1.0] + [0.0] * 10)
    assert peak == pytest.approx(peak[::-1])
    assert max(peak) == peak[10]
    weights = [0.85 ** abs(i - 3) for i in range(9)]
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smoothed(values)[3] == pytest.approx(mean)


@pytest.mark.parametrize("held_out", [0.5, 0.501, 0.499, 0.9])
def test_numbers_at_the_end_do_not_overprint_each_other(held_out, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    lines = [{"step": step, "loss": 0.5, "lr": 0.1} for step in range(1, 30)]
    evaluations = [{"step": 0, "eval_loss": 0.95}, {"step": 29, "eval_loss": held_out}]
    draw_losses([*evaluations[:1], *lines, *evaluations[1:]], tmp_path / "loss.png")
    figure = pyplot.gcf()
    first, second = (text.get_window_extent() for text in figure.axes[0].texts)
    assert not first.overlaps(second)
    monkeypatch.undo()
    pyplot.close(figure)
