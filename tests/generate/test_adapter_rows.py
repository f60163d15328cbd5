"""The rows that an adapter has for itself over a head with a bias."""

from dataclasses import replace

import torch
from torch import nn

import veneer
from support.tiny_models import VOCAB, tiny
from veneer.formats.capture import capture
from veneer.formats.state import NewTokenRows
from veneer.generate.runners.adapter_rows import Ends, own_rows


def test_new_tokens_have_no_bias_and_others_have_theirs():
    model = tiny("llama")
    dim = model.get_output_embeddings().in_features
    head = nn.Linear(dim, VOCAB)
    model.set_output_embeddings(head)
    state = capture(veneer.attach(model, veneer.LoRA(rank=1, targets="attention")))
    weight, new = torch.randn(VOCAB, dim), torch.randn(3, dim)
    tokens = NewTokenRows(("a", "b", "c"), VOCAB - 2, torch.randn(3, dim), new)
    path = f"{Ends.of(model).head_path}.weight"
    own = own_rows(model, replace(state, modules_to_save={path: weight}, new_tokens=tokens))
    assert own.size == VOCAB + 1
    assert sorted(own.head_ids.tolist()) == [*range(VOCAB + 1)]
    order = own.head_ids.argsort()
    assert torch.equal(own.head[order], torch.cat([weight[: VOCAB - 2], new]))
    assert torch.equal(own.bias[order], torch.cat([head.bias[: VOCAB - 2], torch.zeros(3)]))
