"""Log-probabilities of continuations are those of the model's own forward, one row at a time."""

import copy

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import ids, shake
from support.tiny_models import tiny
from veneer.errors import ConfigError
from veneer.evaluation.scores import scores

LONGEST = 24


def pairs():
    """Return continuations of unequal lengths: three that differ in their last token only, one
    inside of another, one whose context is too long, and one of which each token is the likeliest.
    """
    text = ids(1, 40, seed=7)[0].tolist()
    shared = [(text[:9], [*text[9:11], last]) for last in (5, 6, 7)]
    return [*shared, (text[:9], text[9:11]), (text[:30], text[30:36]), (text[:1], text[1:4])]


def plain(model, rows):
    """Return log p of each continuation, and whether it is greedy, by the model's own forward."""
    sums, greedy = [], []
    for context, continuation in rows:
        tokens = torch.tensor([(*context, *continuation)[-LONGEST - 1 :]])
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
        log_p = logits.log_softmax(-1)[-len(continuation) :]
        sums.append(log_p.gather(1, torch.tensor(continuation)[:, None]).sum())
        greedy.append(log_p.argmax(-1).tolist() == list(continuation))
    return torch.stack(sums), greedy


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_are_the_models_own(architecture):
    targets = "all" if architecture == "llama" else ["c_attn"]
    model = shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets=targets)), size=0.2)
    rows = pairs()
    with torch.no_grad():
        likeliest = int(model(input_ids=torch.tensor([rows[-1][0]])).logits[0, -1].argmax())
    rows.append((rows[-1][0], [likeliest]))
    wide = copy.deepcopy(model).double()
    ours = scores(model, rows, longest=LONGEST, tokens_per_batch=32)
    theirs, greedy = plain(model, rows)
    reference, _ = plain(wide, rows)
    assert_no_further(torch.tensor([s.log_p for s in ours]), theirs, reference, "log p")
    assert [s.greedy for s in ours] == greedy
    assert greedy[-1]


def test_a_continuation_has_to_fit():
    with pytest.raises(ConfigError, match="25 tokens does not fit"):
        scores(tiny("llama"), [([3], [4] * 25)], longest=LONGEST)
