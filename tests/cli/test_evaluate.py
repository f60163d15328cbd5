"""`veneer evaluate`: flags that do not go together, and who answers better."""

import json

import veneer
from support.random_adapters import shake


def test_all_that_is_missing_is_said_at_once(refused):
    assert "--tasks or --tasks-from" in refused("evaluate", "m")
    error = refused("evaluate", "m", "--against", "base", "--limit", "0", "--adapter", "a")
    assert "--limit do nothing with --against" in error
    assert "--prompts FILE" in error
    assert "--judge" in error
    error = refused("evaluate", "m", "--tasks", "t", "--judge", "exact", "--with-base")
    assert "--judge do nothing without --against" in error
    assert "--with-base does nothing" in error


def test_an_adapter_is_compared_with_its_base(minigpt_home, tmp_path, shown):
    base = veneer.load_base(str(minigpt_home), dtype="float32")
    adapter = tmp_path / "adapter"
    veneer.save(shake(veneer.attach(base.model, veneer.LoRA(rank=2)), size=0.5), adapter)
    prompts = tmp_path / "prompts.jsonl"
    veneer.use(base.model, None)
    questions = [f"What is the colour of {what}?" for what in ("grass", "snow", "a lemon")]
    short = veneer.Sampling(max_new_tokens=8)
    right = veneer.answers(base.model, base.tokenizer, questions, sampling=short)
    rows = [
        {"prompt": q, "references": [a or "nothing"]} for q, a in zip(questions, right, strict=True)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", minigpt_home, "--adapter", f"mine={adapter}", "--against", "base"]
    command += ["--prompts", prompts, "--judge", "exact", "--dtype", "float32"]
    command += ["--max-new-tokens", 8]
    results = json.loads(shown(*command, "--json"))
    assert (results["wins"], results["ties"], results["losses"]) == (0, 0, 3)
    assert results["verdict"] == "undecided"  # three prompts are too few
    table = shown(*command)
    assert "mine against base" in table
    assert "43.9% to 100.0%" in table
