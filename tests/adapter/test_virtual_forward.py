"""Virtual tokens in the forward pass: plain calls, padding, windows, generation."""

from typing import Any

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import copy_of, distance, ids, logits
from support.tiny_models import ARCHITECTURES, tiny
from support.virtual import (
    COUNT,
    METHODS,
    exact,
    first_tokens,
    generated,
    new_model,
    prepend,
    virtual,
    with_wide_window,
)

each_method = pytest.mark.parametrize("method", METHODS)
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_method
@each_model
def test_fresh_virtual_tokens_act_as_the_tokens_that_they_start_from(architecture, method):
    model, text = tiny(architecture), ids()
    base, longer = logits(model), prepend(first_tokens(3), text)
    peer = logits(model, longer)[:, COUNT:]
    reference = logits(exact(model), longer)[:, COUNT:]
    assert distance(peer, base) > 0.01
    veneer.attach(model, virtual(method), seed=3)
    positions = torch.arange(text.shape[1]).expand(len(text), -1)
    ones = torch.ones_like(text)
    embedded = model.get_input_embeddings()(text)
    calls: dict[str, dict[str, Any]] = {
        "plain": {"input_ids": text},
        "without a cache": {"input_ids": text, "use_cache": False},
        "mask": {"input_ids": text, "attention_mask": ones},
        "positions": {"input_ids": text, "position_ids": positions, "use_cache": False},
        "one row of positions": {"input_ids": text, "position_ids": positions[:1]},
        "both": {"input_ids": text, "attention_mask": ones.bool(), "position_ids": positions},
        "embeddings": {"inputs_embeds": embedded, "use_cache": False},
    }
    with torch.no_grad():
        for call, arguments in calls.items():
            assert_no_further(model(**arguments).logits, peer, reference, call)
        hidden = model.get_decoder()(text).last_hidden_state
        assert hidden.shape[1] == text.shape[1]
        assert_no_further(model.get_output_embeddings()(hidden), peer, reference)


@pytest.mark.parametrize("options", [{}, {"position_ids": None}], ids=["positions", "none"])
@each_method
@each_model
@pytest.mark.thinned
def test_padding_is_not_seen(architecture, method, options):
    model = with_wide_window(new_model(architecture, method))
    long, short = ids(2, 11)[:1], ids(2, 7, seed=2)[:1]
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        arguments = {"attention_mask": mask, "position_ids": positions} | options
        padded = model(torch.cat([long, left]), **arguments, use_cache=False).logits
    wide = exact(model)
    assert_no_further(padded[:1], logits(model, long), logits(wide, long))
    assert_no_further(padded[1:, 4:], logits(model, short), logits(wide, short))


@each_method
@each_model
@pytest.mark.thinned
def test_generation_with_a_cache_equals_recomputing_and_each_row_alone(architecture, method):
    model = with_wide_window(new_model(architecture, method))
    wide = exact(model)
    rows = [ids(1, 12)[0], ids(1, 5, seed=1)[0], ids(1, 9, seed=2)[0]]
    tokens, scores = generated(model, rows)
    again, recomputed = generated(model, rows, use_cache=False)
    assert torch.equal(tokens, again)
    for i, row in enumerate(rows):
        alone, own = generated(model, [row])
        assert torch.equal(alone[0], tokens[i])
        # One step at a time equals the whole text at once.
        text = torch.cat([row, alone[0]])[None]
        whole, reference = (logits(x, text)[0, len(row) - 1 : -1] for x in (model, wide))
        for ours in (scores[i], recomputed[i], own[0]):
            assert_no_further(ours, whole, reference)
    veneer.use(model, None)
    assert not torch.allclose(generated(model, rows)[1], scores, atol=1e-2)


@each_method
def test_a_window_that_cuts_off_virtual_tokens(method):
    model = new_model("mistral", method)
    assert model.config.sliding_window < 12 + COUNT
    row = ids(1, 12)[0]
    tokens, scores = generated(model, [row])
    text = torch.cat([row, tokens[0]])[None]
    whole, reference = (logits(x, text)[0, len(row) - 1 : -1] for x in (model, exact(model)))
    assert_no_further(scores[0], whole, reference)
    assert_no_further(generated(model, [row], use_cache=False)[1][0], whole, reference)
    wide = generated(with_wide_window(copy_of(model)), [row])[1]
    assert not torch.allclose(wide, scores, atol=1e-2)
    with pytest.raises(veneer.AdapterError, match="padded on the left to 17 tokens"):
        generated(model, [row, row[:5]])
    generated(model, [row, row.flip(0)])  # of one length


@each_method
def test_beams_keep_the_virtual_tokens(method):
    model, rows = new_model("llama", method), [ids(1, 9)[0], ids(1, 6, seed=1)[0]]
    tokens = generated(model, rows, num_beams=3)[0]
    assert torch.equal(tokens, generated(model, rows, num_beams=3, use_cache=False)[0])


@each_method
def test_a_mask_of_scores_is_refused(method):
    model = new_model("llama", method)
    with pytest.raises(veneer.AdapterError, match="mask"):
        model(ids(), attention_mask=torch.zeros(2, 1, 12, 12))
