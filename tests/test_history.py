"""The history of benchmarks: what is added stays, and a slower commit is named."""

import json

import pytest
from bench import history


def line(commit: str, rounds: list[float], *, processor: str = "a", better: bool = False) -> str:
    values = {"commit": commit, "time": "2030-01-01T00:00:00+00:00", "processor": processor}
    values |= {"command": "-m bench.x", "figure": "seconds", "higher_is_better": better}
    return json.dumps({**values, "rounds": rounds})


@pytest.fixture
def shown(tmp_path, capsys):
    def show(*lines: str) -> tuple[int, str]:
        path = tmp_path / "history.jsonl"
        path.write_text("".join(text + "\n" for text in lines))
        code = history.main(["show", "--file", str(path), "--plot", str(tmp_path / "plot.png")])
        assert (tmp_path / "plot.png").stat().st_size > 1000
        return code, capsys.readouterr().out

    return show


@pytest.mark.draws
def test_a_commit_is_slower_only_beyond_noise_and_on_the_same_processor(shown):
    code, text = shown(line("one", [1.0, 1.2]), line("two", [1.1, 1.5]), line("three", [1.6, 1.7]))
    assert code == 1
    assert "three is worse than two" in text
    assert "two is worse" not in text
    code, text = shown(line("one", [1.0, 1.1]), line("two", [2.0, 2.1], processor="b"))
    assert code == 0


def test_where_more_is_better_less_is_worse(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(line("one", [90, 100], better=True) + "\n" + line("two", [70, 80], better=True))
    (worse,) = history.slower(history.read(path))
    assert worse.startswith("two is worse than one")
    assert not history.slower(history.read(path)[::-1])


def test_add_measures_and_keeps_what_was_there(tmp_path, capsys):
    path = tmp_path / "h.jsonl"
    path.write_text(line("one", [1.0]) + "\n")
    code = "print('tokens/s (real): 1,234.5')"
    figure = ["--figure", "tokens/s (real):"]
    add = ["add", "--file", str(path), "--rounds", "2", *figure, "--", "-c", code]
    assert history.main(add) == 0
    first, second = history.read(path)
    assert first.commit == "one"
    assert second.rounds == (1234.5, 1234.5)
    assert second.command == f"-c {code}"
    assert second.processor


def test_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(line("one", [1.0]) + "\n{}\n")
    with pytest.raises(SystemExit, match=r"h\.jsonl:2"):
        history.read(path)
