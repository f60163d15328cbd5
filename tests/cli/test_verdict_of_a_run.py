"""What `veneer tune` says of a run in the end: on the terminal, in its files, by its exit code."""

import re

from support.tuned_facts import metrics, weights
from veneer.formats import merged
from veneer.formats.locate import locate
from veneer.run_directory import RunDirectory


def test_a_run_that_learnt_says_so_and_again_when_it_is_resumed(
    tune, data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    flags = ("--out", out, "--eval-data", data, "--steps", 30, "--lr", 0.01)
    flags = (*flags, "--tokens-per-step", 128, "--eval-every", 10)
    assert tune(*flags) == 0
    printed = capsys.readouterr().out
    (verdict,) = re.findall(r"^Verdict (.*)$", printed, re.MULTILINE)
    assert verdict.startswith("Learnt: held-out loss ")
    assert printed.endswith(f"Verdict {verdict}\n")  # last, where it is seen
    progress = {"steps": 30, "ended": "finished", "verdict": verdict}
    assert RunDirectory(out).read_progress() == progress
    losses = [line["eval_loss"] for line in metrics(out) if "eval_loss" in line]
    assert f"{losses[0]:.3f} → {min(losses):.3f}" in verdict
    # A run whose results cannot be written has failed, whatever it learnt.
    with monkeypatch.context() as patch:
        patch.setattr(merged, "write_model", no_space)
        assert tune(*flags, "--resume") == 75
    failed = {"ended": "failed", "why": "After the training: [Errno 28] No space left on device"}
    assert RunDirectory(out).read_progress() == progress | failed
    assert locate(out).path == out / "lora_adapter"  # which was written before that
    assert tune(*flags, "--resume") == 0
    assert RunDirectory(out).read_progress() == progress


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_run_that_diverged_has_a_code_of_its_own_and_keeps_its_best_weights(
    tune, data, tmp_path, capsys, minigpt_home
):
    out = tmp_path / "out"
    course = ("--lr", 0.3, "--schedule", "constant", "--warmup", 0, "--tokens-per-step", 48)
    assert tune("--out", out, "--eval-data", data, "--steps", 12, *course) == 3
    printed = capsys.readouterr().out
    assert "Diverged in 12 steps" in printed
    assert "Trained" not in printed
    assert "Verdict The run diverged from the start: held-out loss" in printed.splitlines()[-1]
    assert "--lr is 0.3; leave it out, and 0.005 is chosen." in printed.splitlines()[-1]
    assert RunDirectory(out).read_progress()["ended"] == "diverged"
    # Nothing was better than what it started from.
    assert all(not w.any() for name, w in weights(out).items() if name.endswith("lora_B"))
    assert not (out / "lora_merged").exists()
    assert "No merged model is written: the run diverged" in printed
    command = f"veneer merge {minigpt_home} {out}/lora_adapter {out}/lora_merged"
    assert command in " ".join(printed.split())
    assert tune("--out", out, "--force", "--quiet", "--steps", 12, *course) == 3
    assert "weights are those of the end" in " ".join(capsys.readouterr().err.split())
