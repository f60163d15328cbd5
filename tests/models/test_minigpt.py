"""MiniGPT is a transformers causal LM like any other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_models import VOCAB, tiny
from veneer.adapter.config import LoRA
from veneer.adapter.report import report_targets
from veneer.models import minigpt
from veneer.models.load import load_skeleton


def rows(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randint(3, VOCAB, (length,)) for length in lengths]


@pytest.fixture
def model():
    return tiny("minigpt")


def test_the_auto_classes_know_it(model, tmp_path):
    minigpt.register()
    minigpt.register()  # twice is as good as once
    config = AutoConfig.for_model("minigpt", num_layers=2)
    assert isinstance(config, minigpt.MiniGPTConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), minigpt.MiniGPTForCausalLM)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, minigpt.MiniGPTForCausalLM)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    (tokens,) = rows(11)
    with torch.no_grad():
        assert torch.equal(again(tokens[None]).logits, model(tokens[None]).logits)
    assert model.get_decoder() is model.model
    assert model.get_output_embeddings() is model.lm_head
    assert model.config.hidden_size == model.config.embed_dim
    assert model.config.max_position_embeddings == model.config.context


def test_generating_with_a_cache_and_without_is_the_same(model):
    (tokens,) = rows(9)
    options = {"max_new_tokens": 24, "eos_token_id": None}
    for choice in ({"do_sample": False}, {"do_sample": True, "temperature": 1.2, "top_k": 0}):
        answers = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            answers.append(model.generate(tokens[None], use_cache=use_cache, **options, **choice))
        assert answers[0].shape == (1, 33)
        assert torch.equal(*answers)


def test_logits_with_a_cache_are_those_of_the_whole(model):
    (tokens,) = rows(12)
    with torch.no_grad():
        whole = model(tokens[None]).logits
        first = model(tokens[None, :7], use_cache=True)
        rest = model(tokens[None, 7:], cache=first.cache, use_cache=True)
    joined = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)


def test_rows_padded_on_the_left_are_as_if_alone(model):
    alone = rows(3, 12, 7)
    longest = 12
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in alone])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in alone])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)[:, longest:]
    for row, new in zip(alone, together, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], new)


def test_rows_padded_on_the_right_have_the_logits_they_have_alone(model):
    alone = rows(3, 12, 7)
    ids = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in alone], batch_first=True)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, logits in zip(alone, together, strict=True):
            torch.testing.assert_close(
                logits[: len(row)], model(row[None]).logits[0], rtol=1e-4, atol=1e-5
            )


def test_no_token_sees_those_behind_it(model):
    (tokens,) = rows(12)
    changed = tokens.clone()
    changed[8:] = (changed[8:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(tokens[None]).logits[0], model(changed[None]).logits[0]
    assert torch.equal(a[:8], b[:8])
    assert not torch.allclose(a[8:], b[8:])


def test_loss_embeddings_and_kept_logits_are_as_in_any_causal_lm(model):
    (tokens,) = rows(12)
    labels = tokens.clone()
    labels[:4] = -100
    with torch.no_grad():
        whole = model(tokens[None], labels=labels[None])
        expected = F.cross_entropy(whole.logits[0, 3:-1], labels[4:])
        torch.testing.assert_close(whole.loss, expected)
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens[None]))
        assert torch.equal(embedded.logits, whole.logits)
        last = model(tokens[None], logits_to_keep=2).logits
        torch.testing.assert_close(last, whole.logits[:, -2:])


def test_rank_4_on_attention_is_512_parameters_a_projection():
    for model in (minigpt.MiniGPTForCausalLM(minigpt.MiniGPTConfig()), load_skeleton("minigpt")):
        report = report_targets(model, LoRA(rank=4, targets="attention"))
        assert len(report.lines) == 16
        for line in report.lines:
            assert line.path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj")
            assert (line.out, line.in_, line.rank) == (64, 64, 4)
            assert line.trained == 512
            assert line.share == 0.125
        assert report.trained == 16 * 512
        tied = {id(weight): weight.numel() for weight in model.parameters()}
        assert report.base_parameters == sum(tied.values())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_text_is_unknown_to_its_tokenizer(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


TOKENIZER = minigpt.wrap_tokenizer(minigpt.train_tokenizer(["a cow says moo"] * 3, 300))


def test_the_chat_template_marks_turns_with_single_tokens():
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hm?<|end|><|assistant|>Yes.<|end|><|assistant|>"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids.count(TOKENIZER.eos_token_id) == 2
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Hm?Yes."
