"""Every causal language model of transformers lets an adapter act from an invocation on, or says
why it cannot."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.every_architecture import MODEL_TYPES, NO_MODEL, small
from support.random_adapters import ids, shake, with_invocation
from veneer.adapter.targets import describe_base
from veneer.errors import AdapterError

INVOCATION = (3, 4)
START = 4
ROW = with_invocation(ids(1, 12, vocabulary=60)[0], INVOCATION)[None]
# Models whose first tokens see the last ones.
SEE_ALL = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
)
READS_OTHERS, READS_WEIGHT = r"reads \d+ rows of a batch of 12", "computes with the weight of"
REFUSED = {
    **dict.fromkeys(("blt", "cpmant", "prophetnet", "zaya"), READS_OTHERS),
    **dict.fromkeys(("falcon_mamba", "jamba", "longcat_flash", "mamba", "rwkv"), READS_WEIGHT),
}
CAUSAL = [each for each in MODEL_TYPES if each not in {*NO_MODEL, *SEE_ALL}]


def activated(model: Any) -> Any:
    layers = describe_base(model).layers
    paths = [x.path for x in layers if x.is_linear and x.block is not None and not x.is_head]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)  # of uncovered weights
        veneer.attach(model, veneer.LoRA(rank=2, targets=paths, invocation=INVOCATION))
    return shake(model, size=0.2)


@torch.no_grad()
def logits(model: Any, tokens: Tensor = ROW, **options: Any) -> Tensor:
    return model(tokens, use_cache=False, **options).logits


def far(ours: Tensor, base: Tensor) -> Tensor:
    """Return how far the logits of each token are from the base's, (tokens,), relatively."""
    return (ours - base).norm(dim=-1)[0] / base.norm(dim=-1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CAUSAL)
def test_it_acts_from_its_invocation_on(architecture):
    base = logits(small(architecture))
    model = activated(small(architecture))
    if architecture in REFUSED:
        with pytest.raises(AdapterError, match=REFUSED[architecture]):
            logits(model)
        return
    distance = far(logits(model), base)
    # Not to the bit: experts may be computed in another order.
    assert float(distance[:START].max()) < 1e-5 < 1e-3 < float(distance[START:].min())


def test_a_model_that_embeds_its_tokens_itself_says_which_they_are():
    model = activated(small("gemma3"))
    padded = torch.cat([ROW, torch.tensor([[3, 4]])], 1)  # with an invocation of padding
    mask = torch.tensor([[1] * ROW.shape[1] + [0, 0]])
    distance = far(logits(model), logits(small("gemma3")))
    assert float(distance[:START].max()) == 0
    assert float(distance[START:].min()) > 1e-3
    ours = logits(model, padded, attention_mask=mask)[:, : ROW.shape[1]]
    torch.testing.assert_close(ours, logits(model))
    with pytest.raises(AdapterError, match="give the model input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, model.config.get_text_config().hidden_size))
