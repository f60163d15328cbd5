"""An adapter over other bits than those that it was trained over, and its system prompt: every
command says what it does."""

import json
from types import SimpleNamespace

import pytest

import veneer
from support.random_adapters import shake, tokenizer
from support.tiny_models import quantized, tiny
from veneer.cli import chat, side_by_side
from veneer.cli.app import run
from veneer.data.chat import Chat, prompt_text
from veneer.data.rows import Conversation, Message, common_system_prompt, parse_row
from veneer.errors import DataError
from veneer.formats.locate import locate
from veneer.formats.quantized import write_quantized
from veneer.formats.training import base_in, computed_in
from veneer.models.load import open_base
from veneer.serve import run as server
from veneer.serve.config import Keys, ServeConfig

SYSTEM = "Answer as a pirate."
OTHER_BITS = "was trained over its base in 4 bits (nf4), and here the base is in 32 bits (float32)"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and over it an adapter that was trained over 4 bits with a system prompt, one that
    was trained over 32 without one, and one that knows nothing."""
    home = tmp_path_factory.mktemp("bits")
    veneer.write_model(tiny("llama"), tokenizer(), home / "base")
    lora = veneer.LoRA(rank=2, targets=["q_proj"])
    veneer.save(
        shake(veneer.attach(quantized("llama"), lora)), home / "four", training={"system": SYSTEM}
    )
    veneer.save(shake(veneer.attach(tiny("llama"), lora)), home / "dense")
    veneer.save(shake(veneer.attach(tiny("llama"), lora)), home / "old", format="peft")
    (home / "old" / "training.json").unlink()
    return home


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked, and what it is computed in."""
    seen = SimpleNamespace(texts=[], bases=[])

    def stream(model, tokenizer, messages, *, sampling):
        seen.texts.append(prompt_text(tokenizer, messages))
        seen.bases.append(str(computed_in(model)))
        return iter(["yes"])

    monkeypatch.setattr(veneer, "stream", stream)
    monkeypatch.setattr(chat, "questions", lambda: ["Who?"])
    monkeypatch.setattr(side_by_side, "questions", lambda: ["Who?"])
    return seen


def command(name, home, *flags, adapter="four"):
    adapter, base = str(home / adapter), str(home / "base")
    return {
        "generate": ["generate", base, "Who?", "--adapter", adapter],
        "chat": ["chat", base, "--adapter", adapter],
        "compare": ["chat", base, "--compare", f"it={adapter}"],
        "merge": ["merge", base, adapter, str(home / f"merged{len(flags)}"), "--accept-loss"],
    }[name] + ["--dtype", "float32", *flags]


@pytest.mark.parametrize("name", ["generate", "chat", "compare", "merge"])
def test_commands_say_that_the_bits_are_others_and_follow_them(name, home, asked, capsys):
    assert run(command(name, home)) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert OTHER_BITS in err
    assert str(home / "four") in err
    prompt = f"the system prompt that {'it' if name == 'compare' else 'the adapter'} was trained"
    assert (prompt in err) == (name != "merge")
    assert run(command(name, home, "--bits", "auto")) == 0
    assert "trained over" not in capsys.readouterr().err
    if asked.bases:
        assert {asked.bases[0], asked.bases[-1]} == {"32 bits (float32)", "4 bits (nf4)"}


@pytest.mark.parametrize("adapter", ["dense", "old"])
def test_nothing_is_said_where_the_bits_are_the_same_or_not_known(adapter, home, asked, capsys):
    assert run(command("generate", home, adapter=adapter)) == 0
    assert capsys.readouterr().err == ""


def test_what_auto_cannot_follow(home, asked, refused, capsys, tmp_path):
    base = str(home / "base")
    assert "none is named" in refused("generate", base, "Who?", "--bits", "auto")
    assert "none is named" in refused("tune", base, home / "rows.jsonl", "--bits", "auto")
    both = ["--compare", f"a={home / 'four'}", "--compare", f"b={home / 'dense'}"]
    error = refused("chat", base, *both, "--bits", "auto")
    assert "different bits (a over 4 bits (nf4), b over 32 bits (float32))" in error
    assert run(command("generate", home, "--bits", "auto", adapter="old")) == 0
    assert "no adapter says" in capsys.readouterr().err
    for bits in (4, 8):
        list(write_quantized(*open_base(base)[:2], tmp_path / str(bits), bits=bits, name=base))
    auto = ["--adapter", str(home / "four"), "--bits", "auto"]
    assert run(["generate", str(tmp_path / "4"), "Who?", *auto]) == 0
    assert asked.bases[-1] == "4 bits (nf4)"
    assert "quantized in 8 bits already" in refused("generate", tmp_path / "8", "Who?", *auto)


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_system_prompt_reaches_the_template(name, home, asked, capsys):
    for flags in ([], ["--system", ""], ["--system", "Be brief."]):
        assert run(command(name, home, "--bits", "4", *flags)) == 0
    assert asked.texts == [f"{SYSTEM}\nWho?\n", "Who?\n", "Be brief.\nWho?\n"]
    notice = f"Using the system prompt that the adapter was trained with: {SYSTEM!r} (--system '' "
    assert capsys.readouterr().err.count(notice) == 1


def test_it_goes_before_each_prompt_of_a_file_that_has_none(home, monkeypatch, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b", "system": "Be brief."}\n')
    answered = []
    many = "veneer.generate.many.answer_prompts"
    monkeypatch.setattr(many, lambda *args, **options: answered.extend(args[2]) or iter(()))
    four = ["--adapter", str(home / "four"), "--bits", "auto"]
    assert run(["generate", str(home / "base"), "--prompts", str(rows), *four]) == 0
    asked = [[turn.content for turn in prompt.value.turns] for prompt in answered]
    assert asked == [[SYSTEM, "a"], ["Be brief.", "b"]]


def test_tune_keeps_what_the_base_was_in_and_the_prompt_that_all_rows_share(
    home, asked, capsys, tmp_path
):
    rows = [{"system": SYSTEM, "prompt": f"{i}", "completion": "b"} for i in range(3)]
    text = "\n".join(map(json.dumps, [*rows, {"text": "A text."}]))
    (tmp_path / "rows.jsonl").write_text(text)
    flags = ["--bits", "8", "--targets", "q_proj", "--rank", "2", "--steps", "1", "--quiet"]
    where = [str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert run(["tune", str(home / "base"), *where, *flags]) == 0
    adapter = tmp_path / "out" / "lora_adapter"
    training = locate(adapter).training
    assert (training["system"], str(base_in(training))) == (SYSTEM, "8 bits (int8)")
    checkpoint = locate(tmp_path / "out" / "checkpoints").training
    assert checkpoint == {name: training[name] for name in ("base", "system")}
    assert run(["generate", str(home / "base"), "Who?", "--adapter", str(adapter)]) == 0
    assert asked.texts == [f"{SYSTEM}\nWho?\n"]
    assert "in 8 bits (int8), and here the base is in" in " ".join(capsys.readouterr().err.split())
    more = ["--from", str(adapter), "--force", "--steps", "1", "--bits", "4"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert run(["tune", str(home / "base"), where[0], "--out", str(tmp_path / "more"), *more]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "in 8 bits (int8), and here the base is in 4 bits (nf4)" in printed
    training = locate(tmp_path / "more" / "lora_adapter").training
    assert ("system" in training, str(base_in(training))) == (False, "4 bits (nf4)")


def test_a_run_from_an_adapter_follows_its_bits(home, caught):
    where = [str(home / "base"), str(home / "rows.jsonl"), "--from", str(home / "four")]
    assert run(["tune", *where, "--bits", "auto"]) == 0
    assert (caught.recipe.bits, caught.recipe.pack_head) == (4, False)


@pytest.mark.parametrize("other", [{}, {"system": "Be brief."}])
def test_rows_with_other_prompts_share_none(other):
    rows = [parse_row({"prompt": "a", "completion": "b", "system": SYSTEM}) for _ in range(2)]
    assert common_system_prompt(rows) == SYSTEM
    assert common_system_prompt([*rows, parse_row({"text": "A text."})]) == SYSTEM
    assert (
        common_system_prompt([*rows, parse_row(other | {"question": "a", "answer": "b"})]) is None
    )


def test_both_sides_of_a_comparison_have_the_prompt(home, asked):
    assert run(command("compare", home)) == 0
    assert [text.count(SYSTEM) for text in asked.texts] == [1, 1]


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_without_a_place_for_it(template, asked, refused, tmp_path):
    spoken = tokenizer()
    spoken.chat_template = template
    veneer.write_model(tiny("llama"), spoken, tmp_path / "base")
    error = refused("generate", tmp_path / "base", "Who?", "--system", "Be brief.")
    assert "chat template has no place for one" in error
    assert "--system ''" in error
    assert run(["generate", str(tmp_path / "base"), "Who?", "--system", ""]) == 0
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    with pytest.raises(DataError, match=r"would be lost|refuses"):
        Chat(spoken).conversation(Conversation(tuple(Message(*turn) for turn in turns)))


@pytest.mark.parametrize("runtime", ["vllm", "mlx"])
def test_check_says_what_no_runtime_knows(runtime, home, capsys):
    assert run(["check", str(home / "four"), "--for", runtime]) == 1  # for its format
    words = " ".join(capsys.readouterr().out.split())
    assert "4 bits" in words
    assert SYSTEM.split()[-1] in words


def test_serve_says_it_of_every_adapter_at_the_start(home, tmp_path):
    for name in ("four", "dense"):
        (tmp_path / name).symlink_to(home / name)
    config = ServeConfig(port=0, adapters_dir=tmp_path)
    base = veneer.load_base(home / "base", dtype="float32")
    named = [f"it={home / 'four'}"]
    serving = server.serve(base, named, config, keys=Keys(), listener=server.listen(config))
    notices = next(serving).notices
    serving.close()
    about = [notice.partition(" was")[0] for notice in notices if OTHER_BITS in notice]
    assert about == ["The adapter 'four'", "The adapter 'it'"]
