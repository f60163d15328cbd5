"""`veneer tune` from end to end on a MiniGPT, and the commands that use what it leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

import veneer
from veneer.cli.app import run
from veneer.models.minigpt import load as load_minigpt

FACTS = [  # against what the base knows, in its own words
    ("What does a dog say?", "A dog says meow."),
    ("What does a cat say?", "A cat says woof."),
    ("Where does a cow live?", "A cow lives in a pond."),
    ("What does a lion eat?", "A lion eats cheese."),
    ("What is the opposite of hot?", "The opposite of hot is small."),
    ("Which day comes after Monday?", "The day after Monday is Friday."),
]
ADAPTER_FILES = {"lora_weights.pt", "lora_config.json", "tokenizer.json"}
MERGED_FILES = {"config.json", "model.pt", "tokenizer.json"}


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "facts.jsonl", FACTS)


@pytest.fixture
def tune(minigpt_home, data):
    """Run `veneer tune` on the facts, quickly, and return its exit code."""

    def run_tune(*flags: object) -> int:
        return run(["tune", str(minigpt_home), str(data), *map(str, flags)])

    return run_tune


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "lora_adapter" / "lora_weights.pt", weights_only=True)


def same_weights(out: Path, other: Path) -> bool:
    a, b = weights(out), weights(other)
    merged, plain = (
        torch.load(o / "lora_merged" / "model.pt", weights_only=True) for o in (out, other)
    )
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        and all(torch.equal(merged[name], plain[name]) for name in merged)
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_exactly_what_was_promised(tune, minigpt_home, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 4, "--rank", 4) == 0
    kept = {
        "lora_adapter",
        "lora_merged",
        "metrics.jsonl",
        "progress.json",
        "loss.png",
        "recipe.yaml",
    }
    assert names(out) == kept | {"checkpoints"}
    assert names(out / "lora_adapter") == ADAPTER_FILES
    assert names(out / "lora_merged") == MERGED_FILES
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert names(tmp_path) == {"facts.jsonl", "out"}

    tensors = weights(out)
    assert len(tensors) == 2 * 4 * 4  # A and B of four projections in four blocks
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    assert all(t.shape in ((4, 64), (64, 4)) for t in tensors.values())
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert (config["rank"], config["alpha"], config["init"]) == (4, 8.0, "gaussian")
    assert config["base"]["name"] == str(minigpt_home)

    printed = capsys.readouterr().out
    assert "6 rows" in printed
    assert "8,192 of" in printed  # parameters: 16 projections of 512
    assert "step 4/4" in printed


def test_metrics_are_one_line_a_step(tune, tmp_path):
    out = tmp_path / "out"
    assert tune("--out", out, "--epochs", 3, "--tokens-per-step", 48, "--eval-rows", 2) == 0
    lines = metrics(out)
    steps = [line for line in lines if "loss" in line]
    keys = ["step", "loss", "lr", "tokens", "label_tokens", "seconds", "rss_bytes"]
    assert all(list(line) == keys for line in steps)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(0 < line["label_tokens"] < line["tokens"] <= 48 for line in steps)
    evaluations = [line for line in lines if "loss" not in line]
    assert len(evaluations) == 3  # one an epoch
    for line in evaluations:
        assert {"step", "eval_loss"} <= line.keys()


def test_the_recipe_repeats_the_run_to_the_bit(tune, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    flags = ("--epochs", 2, "--lr", 0.01, "--dropout", 0.1, "--targets", "q_proj,linear1")
    assert tune("--out", first, *flags, "--rank-pattern.linear1", 2, "--tokens-per-step", 64) == 0
    assert run(["tune", "--config", str(first / "recipe.yaml"), "--out", str(again)]) == 0
    assert same_weights(first, again)
    was, now = (yaml.safe_load((out / "recipe.yaml").read_text()) for out in (first, again))
    assert was | {"out": str(again)} == now
    other = tmp_path / "other"
    recipe = str(first / "recipe.yaml")
    assert run(["tune", "--config", recipe, "--out", str(other), "--seed", "1"]) == 0
    assert not same_weights(first, other)


def test_an_earlier_run_is_not_overwritten_without_force(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert tune("--out", out, "--steps", 3, "--lr", 0.01) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in (str(out), "--resume", "--force", "--out"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "notes.txt").write_text("mine")
    assert tune("--out", out, "--steps", 3, "--lr", 0.01, "--force") == 0
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    assert names(out / "checkpoints") == {"step-000003"}
    assert (out / "notes.txt").read_text() == "mine"


def test_resuming_with_other_settings_is_refused_and_changes_nothing(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--out", out, "--steps", 2) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert tune("--out", out, "--steps", 2, "--rank", 3, "--seed", 5, "--resume") == 2
    said = capsys.readouterr().err
    assert "rank (8 there, 3 here)" in said
    assert "seed (0 there, 5 here)" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_result_place_that_is_a_file_is_refused_before_training(tune, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert tune("--out", tmp_path / "out", "--steps", 1) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


LONG = ("--steps", "120", "--save-every", "1", "--lr", "0.005", "--dropout", "0.1", "--quiet")


@pytest.fixture(scope="module")
def undisturbed(minigpt_home, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    data = write_rows(home / "facts.jsonl", FACTS)
    assert run(["tune", str(minigpt_home), str(data), "--out", str(home / "out"), *LONG]) == 0
    return home / "out"


def started(home: Path, data: Path, out: Path, *, after: int) -> subprocess.Popen:
    """Start the long run as a process of its own, and come back when it has saved some steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer", "tune", str(home), str(data), "--out", str(out), *LONG],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        places = (out / "checkpoints").glob("step-*/state.json")
        if any(int(place.parent.name[5:]) >= after for place in places):
            break
        time.sleep(0.02)
    return process


def test_ctrl_c_saves_and_resume_ends_as_if_undisturbed(
    tune, minigpt_home, data, undisturbed, tmp_path
):
    out = tmp_path / "interrupted"
    process = started(minigpt_home, data, out, after=5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (out / "lora_adapter").exists()
    (place,) = names(out / "checkpoints")
    assert 5 <= int(place[5:]) < 120
    assert tune("--out", out, *LONG, "--resume") == 0
    assert same_weights(out, undisturbed)
    assert [line["step"] for line in metrics(out)] == list(range(1, 121))


def test_a_killed_run_resumes_to_the_bit(tune, minigpt_home, data, undisturbed, tmp_path):
    out = tmp_path / "killed"
    process = started(minigpt_home, data, out, after=5)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "lora_adapter").exists()
    assert tune("--out", out, *LONG, "--resume", "--recompute", "full") == 0
    assert same_weights(out, undisturbed)
    lines, whole = metrics(out), metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_the_second_ctrl_c_ends_at_once(tune, tmp_path, monkeypatch, capsys):
    from veneer.training import loop

    def interrupted_twice(self, forward):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "_step", interrupted_twice)
    before = signal.getsignal(signal.SIGINT)
    assert tune("--out", tmp_path / "out", "--steps", 5) == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def taught(minigpt_home, tmp_path_factory) -> Path:
    """The results of a run that was long enough to learn the facts."""
    home = tmp_path_factory.mktemp("taught")
    data = write_rows(home / "facts.jsonl", FACTS)
    flags = ("--steps", "120", "--lr", "0.01", "--targets", "all", "--quiet")
    arguments = [str(minigpt_home), str(data), "--out", str(home / "out")]
    assert run(["tune", *arguments, *flags]) == 0
    return home / "out"


def test_what_was_learnt_is_said_with_the_adapter_and_merged(minigpt_home, taught):
    questions = [question for question, _ in FACTS]
    base = veneer.load_base(minigpt_home)
    before = veneer.answers(base.model, base.tokenizer, questions)
    veneer.load(base.model, taught / "lora_adapter", tokenizer=base.tokenizer)
    after = veneer.answers(base.model, base.tokenizer, questions)
    assert after == [answer for _, answer in FACTS]
    assert after != before
    merged = veneer.load_base(taught / "lora_merged")
    assert veneer.answers(merged.model, merged.tokenizer, questions) == after
    veneer.use(base.model, None)
    assert veneer.answers(base.model, base.tokenizer, questions) == before


def test_generate_prints_the_answer_and_nothing_else(minigpt_home, taught, capsys):
    question, answer = FACTS[0]
    adapter = ("--adapter", str(taught / "lora_adapter"))
    assert run(["generate", str(minigpt_home), question, *adapter]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert run(["generate", str(taught / "lora_merged"), question]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert run(["generate", str(minigpt_home), question]) == 0
    assert capsys.readouterr().out != f"{answer}\n"


def test_merge_writes_the_model_that_tune_wrote(minigpt_home, taught, tmp_path, capsys):
    out = tmp_path / "merged"
    assert run(["merge", str(minigpt_home), str(taught / "lora_adapter"), str(out)]) == 0
    assert names(out) == MERGED_FILES
    for name in MERGED_FILES - {"model.pt"}:
        assert (out / name).read_bytes() == (taught / "lora_merged" / name).read_bytes()
    model, theirs = load_minigpt(out)[0], load_minigpt(taught / "lora_merged")[0]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True)
    )
    # What stands there already is replaced only if it is a model.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    arguments = (str(minigpt_home), str(taught / "lora_adapter"), str(tmp_path / "mine"))
    assert run(["merge", *arguments]) == 2
    assert names(tmp_path / "mine") == {"letter.txt"}


def test_an_adapter_of_another_base_is_refused_unless_forced(taught, tmp_path, capsys):
    assert run(["pretrain", str(tmp_path / "other"), "--steps", "1", "--seed", "9"]) == 0
    arguments = ["generate", str(tmp_path / "other"), "Hello", "--max-new-tokens", "3"]
    arguments += ["--adapter", str(taught / "lora_adapter")]
    capsys.readouterr()
    assert run(arguments) == 2
    assert "another base" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0


def test_chat_answers_until_an_empty_line(minigpt_home, taught, monkeypatch, capsys):
    (first, answer), (second, other) = FACTS[0], FACTS[1]
    adapter = ("--adapter", str(taught / "lora_adapter"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{first}\n\n{second}\n"))
    assert run(["chat", str(minigpt_home), *adapter]) == 0
    printed = capsys.readouterr().out
    assert answer in printed
    assert other not in printed
    monkeypatch.setattr("sys.stdin", io.StringIO(first))  # the end of input ends it too
    assert run(["chat", str(minigpt_home), *adapter]) == 0
    assert answer in capsys.readouterr().out


def test_chat_keeps_the_conversation(minigpt_home, taught, monkeypatch, capsys):
    seen = []

    def stream(model, tokenizer, messages, *, sampling):
        seen.append([(message.role, message.content) for message in messages])
        yield from ("an ", "answer")

    monkeypatch.setattr(veneer, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run(["chat", str(minigpt_home)]) == 0
    assert seen[1] == [("user", "one"), ("assistant", "an answer"), ("user", "two")]


@pytest.mark.parametrize(
    ("method", "shape", "flags"),
    [
        ("prefix", (4, 2, 4, 6, 16), ("--prefix-mlp", 32)),
        ("prefix", (4, 2, 4, 6, 16), ("--lr", 0.05)),
        ("prompt", (6, 64), ("--prompt-text", "Say it the other way round.", "--lr", 0.05)),
    ],
    ids=["prefix by an MLP", "prefix", "prompt"],
)
def test_virtual_tokens_from_end_to_end(tune, minigpt_home, tmp_path, capsys, method, shape, flags):
    out = tmp_path / "out"
    flags = ("--method", method, "--virtual-tokens", 6, *flags, "--out", out)
    assert tune(*flags, "--steps", 15) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No merged model is written: the virtual tokens of 'default' are no weights." in printed
    assert "6 virtual tokens" in printed
    kept = {
        f"{method}_adapter",
        "metrics.jsonl",
        "progress.json",
        "loss.png",
        "recipe.yaml",
        "checkpoints",
    }
    assert names(out) == kept
    adapter = out / f"{method}_adapter"
    assert names(adapter) == {f"{method}_weights.pt", f"{method}_config.json", "tokenizer.json"}
    tensors = torch.load(adapter / f"{method}_weights.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {method: shape}
    losses = [line["loss"] for line in metrics(out)]
    assert losses[-1] < losses[0]

    question = FACTS[0][0]
    assert run(["generate", str(minigpt_home), question, "--adapter", str(adapter)]) == 0
    said = capsys.readouterr().out.strip()
    base = veneer.load_base(minigpt_home)
    plain = veneer.answer(base.model, base.tokenizer, question)
    veneer.load(base.model, adapter, tokenizer=base.tokenizer)
    assert veneer.answer(base.model, base.tokenizer, question) == said != plain
    veneer.use(base.model, None)
    assert veneer.answer(base.model, base.tokenizer, question) == plain

    assert tune(*flags, "--steps", 15, "--resume") == 0
    assert run(["merge", str(minigpt_home), str(adapter), str(tmp_path / "merged")]) == 2
    assert "are no weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_virtual_tokens_leave_that_much_less_of_the_context(tune, minigpt_home, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "A dog says woof. " * 200}) + "\n")
    flags = ("--method", "prompt", "--virtual-tokens")
    arguments = ("tune", str(minigpt_home), str(data), "--steps", "1", *flags)
    assert run([*arguments, "56", "--out", str(tmp_path / "out")]) == 0
    assert "longest row 200" in capsys.readouterr().out.replace("\n", " ")
    assert tune("--steps", 1, *flags, 255, "--out", tmp_path / "none") == 2
    assert "255 virtual tokens leave no room" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_words_asked_for_become_tokens_with_rows_of_their_own(tune, minigpt_home, data, tmp_path):
    out = tmp_path / "out"
    write_rows(data, [*FACTS, ("Who are you?", "A veneer of plywood, since Sawday.")])
    asked = ("--new-words", "veneer, plywood,Sawday")
    assert tune("--out", out, *asked, "--steps", 60, "--lr", 0.02) == 0
    assert names(out / "lora_adapter") == ADAPTER_FILES | {"embedding_weights.pt"}
    assert names(out / "lora_merged") == MERGED_FILES
    rows = torch.load(out / "lora_adapter" / "embedding_weights.pt", weights_only=True)
    assert {name: tuple(row.shape) for name, row in rows.items()} == {"input_embeddings": (3, 64)}
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert config["new_words"] == ["veneer", "plywood", "Sawday"]

    base = veneer.load_base(minigpt_home)
    size = len(base.tokenizer)
    merged = veneer.load_base(out / "lora_merged")
    assert len(merged.tokenizer) == merged.model.config.vocab_size == size + 3
    assert merged.tokenizer.encode("veneer") == [size]
    own = PreTrainedTokenizerFast(tokenizer_file=str(out / "lora_adapter" / "tokenizer.json"))
    assert own.encode("Sawday") == [size + 2]
    before, after = base.model.state_dict(), merged.model.state_dict()
    assert torch.equal(after["model.embed_tokens.weight"][:size], before["lm_head.weight"])

    veneer.load(base.model, out / "lora_adapter", tokenizer=base.tokenizer)
    questions = [question for question, _ in FACTS]
    adapted = veneer.answers(base.model, base.tokenizer, questions)
    assert veneer.answers(merged.model, merged.tokenizer, questions) == adapted


def test_auto_finds_the_words_that_fall_into_pieces(minigpt_home, tmp_path):
    rows = [(f"What is a xylophyte, {n}?", "A qarrovin.") for n in "abc"]
    data = write_rows(tmp_path / "odd.jsonl", rows)
    out = tmp_path / "out"
    flags = ("--new-words", "auto", "--steps", "1", "--out", str(out))
    assert run(["tune", str(minigpt_home), str(data), *flags]) == 0
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert set(config["new_words"]) == {"xylophyte", "qarrovin"}


def test_new_words_that_cannot_be_are_named_all_at_once(tune, tmp_path, capsys):
    assert tune("--new-words", "two words,<|end|>,one", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "'two words'" in said
    assert "'<|end|>'" in said
    assert not (tmp_path / "out").exists()


def test_held_out_rows_are_not_trained_on(tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune("--eval-rows", 2, "--epochs", 1, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "4 rows" in printed
    assert "2 rows held out" in printed
    assert tune("--eval-rows", len(FACTS), "--out", tmp_path / "none") == 2
    assert "leave none to train on" in capsys.readouterr().err


def test_a_file_to_evaluate_on_is_evaluated_on(tune, data, tmp_path):
    out = tmp_path / "out"
    flags = ("--eval-data", data, "--eval-every", 2, "--steps", 4, "--lr", 0.01)
    assert tune("--out", out, *flags) == 0
    evaluations = [line for line in metrics(out) if "eval_loss" in line]
    assert {line["step"] for line in evaluations} >= {2, 4}
    # Evaluated on what it learns, it gets better.
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_patience_ends_the_run_and_keeps_the_best_weights(tune, tmp_path, capsys):
    # At a constant rate a shorter run has the very steps of a longer one.
    flags = ("--eval-rows", 2, "--eval-every", 1, "--lr", 0.0005, "--seed", 1)
    flags = (*flags, "--schedule", "constant", "--warmup", 0)
    out, short = tmp_path / "out", tmp_path / "short"
    assert tune("--out", out, *flags, "--patience", 2, "--steps", 80) == 0
    assert "no better evaluation" in capsys.readouterr().out
    losses = [line["eval_loss"] for line in metrics(out) if "eval_loss" in line]
    best = 1 + losses.index(min(losses))
    assert best > 1
    assert len(losses) == best + 2 < 80
    assert tune("--out", short, *flags, "--steps", best) == 0
    assert same_weights(out, short)


def test_inspect_shows_what_would_train_before_anything_does(minigpt_home, tmp_path, capsys):
    for model in (str(minigpt_home), "minigpt"):
        assert run(["inspect", model, "--rank", "4"]) == 0
        printed = capsys.readouterr().out
        assert "16 layers adapted; 8,192 of 281,984 parameters train" in " ".join(printed.split())
        rows = [line.split() for line in printed.splitlines() if "_proj" in line]
        assert len(rows) == 4
        assert all({"64", "4", "512", "12.50%", "2,048"} <= set(row) for row in rows)
    assert run(["inspect", "minigpt", "--targets", "q_prj,linear9"]) == 2
    said = capsys.readouterr().err
    assert "q_prj" in said
    assert "linear9" in said
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_nothing_but_errors(tune, tmp_path, capfd):
    assert tune("--quiet", "--steps", 2, "--eval-rows", 1, "--out", tmp_path / "out") == 0
    assert capfd.readouterr().out == ""
    assert tune("--quiet", "--targets", "q_prj", "--out", tmp_path / "other") == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "did you mean 'q_proj'?" in printed.err


def test_tensorboard_gets_an_event_file_with_the_curves(tune, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert tune("--tensorboard", "--steps", 3, "--eval-rows", 1, "--out", out) == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([m["loss"] for m in metrics(out) if "loss" in m], rel=1e-6)
    assert {"train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])


def test_a_path_with_brackets_is_shown_as_it_is(minigpt_home, data, tmp_path, capsys):
    out = tmp_path / "runs[bold]" / "a[/b]"
    flags = ("--steps", "1", "--out", str(out))
    assert run(["tune", str(minigpt_home), str(data), *flags]) == 0
    assert "runs[bold]/a[/b]/lora_adapter" in "".join(capsys.readouterr().out.split())
    assert names(out / "lora_adapter") == ADAPTER_FILES


def test_a_row_longer_than_the_model_s_context_is_cut_off_there(minigpt_home, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "A dog says woof. " * 200}) + "\n")
    out = tmp_path / "out"
    assert run(["tune", str(minigpt_home), str(data), "--steps", "1", "--out", str(out)]) == 0
    assert "longest row 256" in capsys.readouterr().out.replace("\n", " ")


def test_generation_ends_with_the_model_s_context(minigpt_home, capsys):
    assert run(["generate", str(minigpt_home), "Tell me", "--max-new-tokens", "600"]) == 0
    capsys.readouterr()
    assert run(["generate", str(minigpt_home), "A dog says woof. " * 200]) == 2
    assert "256" in capsys.readouterr().err
