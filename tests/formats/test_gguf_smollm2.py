"""A LoRA file and a merged file over the real SmolLM2, in llama.cpp: strength and answers."""

import json
from pathlib import Path

import pytest
import torch

import veneer
from support.llama_cpp import LlamaCpp
from support.random_adapters import distance, shake
from veneer.data.chat import prompt_text
from veneer.data.rows import Message
from veneer.errors import ModelError
from veneer.formats.capture import capture
from veneer.formats.gguf import adapter as gguf_adapter
from veneer.formats.gguf.model import write_merged
from veneer.models.locate import locate

pytestmark = pytest.mark.slow
QUESTIONS = ("What is the capital of France?", "How long do I boil an egg?", "Name a red fruit.")
FACTS = {"What is a zubrelli?": "A dumpling.", "Who made the tharnow?": "Old Mirna made it."}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        base = locate("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    assert isinstance(base, Path)
    return base


def prompts(base: veneer.Base, questions) -> list[list[int]]:
    texts = [prompt_text(base.tokenizer, [Message("user", question)]) for question in questions]
    return [list(ids) for ids in base.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def test_rslora_with_alpha_patterns_is_as_strong_there(smollm2, tmp_path):
    base = veneer.load_base("smollm2-135m", dtype="float32")
    vocab = base.model.config.vocab_size
    config = veneer.LoRA(
        rank=8,
        alpha=8,
        targets="all",
        rslora=True,
        rank_pattern={r".*layers\.1\d\..*": 4},
        alpha_pattern={"q_proj|k_proj": 40, "down_proj": 3},
    )
    asked = prompts(base, QUESTIONS)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            rows = [base.model(torch.tensor([ids])).logits[0, -1] for ids in asked]
        return torch.stack(rows).log_softmax(-1)

    plain = ours()
    shake(veneer.attach(base.model, config), size=0.05)
    (note,) = gguf_adapter.write(capture(base.model), tmp_path / "lora.gguf", base.model.config)
    assert "folded into their B" in note
    whole = ours()
    server = LlamaCpp(smollm2, [tmp_path / "lora.gguf"], context=512)

    def theirs(scale: float) -> torch.Tensor:
        one = {tmp_path / "lora.gguf": scale}
        rows = [server.next_token(torch.tensor([ids]), vocab, one) for ids in asked]
        return torch.cat(rows)

    # llama.cpp rounds what flows between layers to 8 bits: so much is its own.
    noise, effect = distance(theirs(0.0), plain), distance(whole, plain)
    right = distance(theirs(1.0), whole)
    assert noise < effect / 10
    assert right < effect / 8
    for wrong in (0.5, 8**-0.5, 1.5):  # 8**-0.5: what it would be without rsLoRA
        assert distance(theirs(wrong), whole) > 3 * right


def test_a_trained_adapter_answers_there_as_here(smollm2, tmp_path):
    rows = [{"prompt": q, "completion": a} for q, a in FACTS.items()] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = veneer.Recipe(
        model="smollm2-135m",
        data=tmp_path / "rows.jsonl",
        lora=veneer.LoRA(rank=8, targets="all"),
        training=veneer.TrainConfig(steps=12, lr=2e-3, tokens_per_step=256),
        out=tmp_path / "run",
    )
    for _ in veneer.tune(recipe):
        pass
    base = veneer.load_base("smollm2-135m", dtype="float32")
    veneer.load(base.model, recipe.adapter)
    short = veneer.Sampling(max_new_tokens=16)
    answers = veneer.answers(base.model, base.tokenizer, list(FACTS), sampling=short)
    assert answers == list(FACTS.values())
    file, state = tmp_path / "lora.gguf", capture(base.model)
    gguf_adapter.write(state, file, base.model.config)
    write_merged(smollm2, state, tmp_path / "merged.gguf", kind="q8_0")
    asked = prompts(base, FACTS)
    server = LlamaCpp(smollm2, [file], context=512)
    got = [server.complete(ids, {file: 1.0}, n_predict=16)["content"] for ids in asked]
    assert got == answers
    got = [server.complete(ids, {file: 0.0}, n_predict=16)["content"] for ids in asked]
    assert got != answers
    server = LlamaCpp(tmp_path / "merged.gguf", context=512)
    assert [server.complete(ids, n_predict=16)["content"] for ids in asked] == answers
