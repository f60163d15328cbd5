"""`veneer tune --objective distill`: from a teacher's run to the student's, and each mistake."""

import pytest
import yaml

import veneer
from support.fake_teacher import fake_teacher
from support.random_adapters import shake
from support.serving_bases import computing_server
from support.tuned_facts import metrics
from veneer.models.load import load_config_and_tokenizer


@pytest.fixture
def tune_refused(tune, capsys):
    """Run `veneer tune` with an objective that must fail with one error; return that."""

    def tune_command(*flags: object) -> str:
        capsys.readouterr()
        assert tune(*flags) == 2
        error = capsys.readouterr().err
        assert error.count("Error:") == 1
        assert "Traceback" not in error
        return " ".join(error.split())

    return tune_command


def test_a_student_learns_from_a_run(tune, tune_refused, tmp_path, capsys):
    teacher, out, nothing = (tmp_path / name for name in ("teacher", "student", "nothing"))
    assert tune("--rank", 4, "--steps", 15, "--lr", 0.01, "--out", teacher) == 0
    flags = ("--objective", "distill", "--teacher", teacher, "--rank", 2, "--steps", 8)
    assert tune(*flags, "--out", out) == 0
    losses = [line["loss"] for line in metrics(out)]
    assert 0 < losses[-1] < losses[0]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["teacher"] == str(teacher)
    assert recipe["divergence"] == "forward"

    text = tune_refused(*flags, "--out", out, "--resume", "--divergence", "reverse")
    assert "divergence" in text
    again = ("--objective", "distill", "--out", nothing)
    assert "name the directory of another adapter" in tune_refused(*again)
    assert "is no directory" in tune_refused(*again, "--teacher", tmp_path / "none")
    assert "is a whole model" in tune_refused(*again, "--teacher", teacher / "lora_merged")
    assert "is no address" in tune_refused(*again, "--teacher", "http://here:a/v1")
    assert "would do nothing with sft" in tune_refused("--teacher", teacher, "--out", nothing)
    text = tune_refused(*again, "--teacher", teacher, "--divergence", "both")
    assert "both" in text
    text = tune_refused(*again, "--teacher", teacher, "--teacher-top-k", 0)
    assert "teacher_top_k is 0" in text
    text = tune_refused(*again, "--teacher", teacher, "--new-words", "two words")
    assert "new_words are tokens that the teacher does not have" in text
    assert not nothing.exists()


FROM_SERVER = ("--objective", "distill", "--rank", 2, "--lr", 0.01, "--out")


def test_a_student_learns_from_a_server(tune, tune_refused, minigpt_home, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret-of-its-own")
    out, nothing = tmp_path / "student", tmp_path / "nothing"
    with fake_teacher() as server:  # whose tokens are others
        server.models[0]["max_model_len"] = 4096
        teacher = ("--teacher", server.address)
        text = tune_refused(*FROM_SERVER, nothing, *teacher, "--eval-data", "none")
        assert "Its model must have the student's tokens" in text
        assert "none" in text  # all at once
        server.tokenizer = load_config_and_tokenizer(str(minigpt_home))[1]
        assert tune(*FROM_SERVER, out, *teacher, "--steps", 2) == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["teacher"], recipe["teacher_top_k"]) == (server.address, 20)
    assert "cannot be reached" in tune_refused(*FROM_SERVER, nothing, *teacher)
    assert not nothing.exists()
    assert "secret" not in "".join(path.read_text("latin-1") for path in out.rglob("*.*"))


@pytest.mark.slow
def test_a_student_learns_from_an_adapter_of_a_server(
    tune, tune_refused, minigpt_home, tmp_path, monkeypatch
):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    teacher, out, nothing = (tmp_path / name for name in ("teacher", "student", "nothing"))
    base = veneer.load_base(str(minigpt_home), dtype="float32")
    veneer.save(shake(veneer.attach(base.model, veneer.LoRA(rank=2)), size=0.3), teacher)
    base = veneer.load_base(str(minigpt_home), dtype="float32")
    with computing_server(base, {"facts": teacher}) as server:
        address = ("--teacher", f"{server.url}/v1")
        assert "several models" in tune_refused(*FROM_SERVER, nothing, *address)
        address += ("--teacher-model", "facts")
        text = tune_refused(*FROM_SERVER, nothing, *address, "--teacher-top-k", 21)
        assert "take a lower --teacher-top-k" in text
        assert tune(*FROM_SERVER, out, *address, "--steps", 8) == 0
    losses = [line["loss"] for line in metrics(out)]
    assert 0 < losses[-1] < losses[0]
