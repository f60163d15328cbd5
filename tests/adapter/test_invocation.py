"""An adapter with an invocation acts from its last occurrence in a row on, wherever tokens pass."""

import copy
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

import veneer
from support.peft_cases import opened
from support.random_adapters import ids, shake, tokenizer
from support.tiny_models import VOCAB, tiny
from veneer.adapter.active import active_adapters_of
from veneer.adapter.invocation import acts_from, invocation_start, invoked, tokenized
from veneer.adapter.use import use_rows
from veneer.data.packing import filled_up, pack
from veneer.errors import AdapterError, ConfigError

INVOCATION = (5, 9)
TARGETS = ("q_proj", "v_proj", "down_proj")


def activated(invocation: tuple[int, ...] = INVOCATION) -> Any:
    config = veneer.LoRA(rank=3, targets=TARGETS, invocation=invocation)
    return shake(veneer.attach(tiny("llama"), config), size=0.3)


def row(*places: int, tokens: int = 14, seed: int = 0) -> list[int]:
    """Return a row with the invocation at these places and at no others."""
    own = ids(1, tokens, seed=seed)[0].masked_fill(ids(1, tokens, seed=seed)[0] == INVOCATION[0], 8)
    for place in places:
        own[place : place + 2] = torch.tensor(INVOCATION)
    return own.tolist()


@torch.no_grad()
def logits(model: Any, *rows: list[int], **options: Any) -> Tensor:
    return model(torch.tensor(rows), **options).logits


@pytest.mark.parametrize(
    ("places", "start"), [([3, 8], 8), ([0], 0), ([12], 12), ([], None), ([5, 7], 7)]
)
def test_it_acts_from_the_last_occurrence_on(places, start):
    model, own = activated(), row(*places)
    assert invocation_start(own, INVOCATION) == start
    ours, base = logits(model, own)[0], logits(tiny("llama"), own)[0]
    start = len(own) if start is None else start
    assert torch.equal(ours[:start], base[:start])
    assert ((ours - base)[start:].abs().amax(-1) > 1e-4).all()
    acts = acts_from(torch.tensor([own]), INVOCATION, torch.zeros(1, len(own), dtype=torch.long))
    assert acts[0].tolist() == [place >= start for place in range(len(own))]


def test_padding_and_the_ends_of_rows_invoke_nothing():
    one, other = row(2), row(tokens=9)
    half = [*other[:-1], INVOCATION[0]]  # whose other half begins the next packed row
    behind = [INVOCATION[1], *one[1:]]
    packed = torch.tensor([half + behind])
    positions = torch.tensor([[*range(len(half)), *range(len(behind))]])
    model = activated()
    with torch.no_grad():
        model.model(input_ids=packed, position_ids=positions, use_cache=False)
    acts = active_adapters_of(model).acts_on["default"]
    assert acts is not None
    expected = [False] * len(half) + [place >= 2 for place in range(len(behind))]
    assert acts[:, 0].tolist() == expected

    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    other = row(3, tokens=9)
    right = torch.tensor([one, [*other, *INVOCATION, 3, 3, 3]])  # an invocation of padding
    with torch.no_grad():
        padded = model(right, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :9], logits(model, other)[0])


def test_a_filled_up_batch_invokes_only_where_its_rows_do():
    example = veneer.data.encode.Example(row(4), row(4), "row", 0)
    batch = filled_up(pack([example], [0]), 64)
    tokens = torch.from_numpy(batch.tokens)[None]
    model = activated()
    with torch.no_grad():
        model.model(
            input_ids=tokens, position_ids=torch.from_numpy(batch.positions)[None], use_cache=False
        )
    acts = active_adapters_of(model).acts_on["default"]
    assert acts is not None
    assert np.flatnonzero(acts[:14, 0].numpy()).tolist() == list(range(4, 14))


def test_generation_is_peft_s(tmp_path):
    """By PEFT's own generate, of prompts that are padded on the left."""
    model = activated()
    veneer.save(model, tmp_path, format="peft")
    theirs = opened("llama", tmp_path)
    padded = [0, 0, 0, *row(1, tokens=11, seed=1)]
    prompts = torch.tensor([row(2, 6), row(), row(9, seed=2), padded])
    options = {
        "attention_mask": (prompts != 0).long(),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = theirs.generate(input_ids=prompts, **options)
    assert torch.equal(model.generate(input_ids=prompts, **options), expected)
    assert not torch.equal(tiny("llama").generate(input_ids=prompts, **options), expected)


def test_a_cache_goes_on_as_it_began():
    """In pieces as at once, whichever piece has the invocation; a new token invokes nothing."""
    own = row(6)
    model, at_once = activated(), logits(activated(), own)
    for cuts in ((9,), (4,), (6, 12), (3, 9, 10)):
        parts, cache = [], None
        for piece in torch.tensor(own).tensor_split(cuts):
            with torch.no_grad():
                out = model(piece[None], cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), at_once)
    alone = activated(INVOCATION[:1])  # one token, which a new token could be
    with torch.no_grad():
        cache = alone(torch.tensor([row()]), use_cache=True).cache
        base = tiny("llama")
        base_cache = base(torch.tensor([row()]), use_cache=True).cache
        token = torch.tensor([[INVOCATION[0]]])
        ours = alone(token, cache=cache).logits
        assert torch.equal(ours, base(token, cache=base_cache).logits)


def test_a_mix_acts_where_each_of_its_adapters_does():
    model = activated()
    plain = veneer.LoRA(rank=2, targets=("q_proj", "up_proj"))
    shake(veneer.attach(model, plain, name="plain"), seed=4)
    own = row(5)
    veneer.use(model, {"default": 0.7, "plain": -1.2})
    mixed = logits(model, own)[0]
    veneer.use(model, {"plain": -1.2})
    before = logits(model, own)[0]
    veneer.use(model, {"default": 0.7})
    torch.testing.assert_close(mixed[:5], before[:5])
    everywhere = copy.deepcopy(model)
    active_adapters_of(everywhere).acts_on.clear()
    veneer.use(everywhere, {"default": 0.7, "plain": -1.2})
    first = row(0)
    veneer.use(model, {"default": 0.7, "plain": -1.2})
    hook = active_adapters_of(everywhere).invocations
    hook.invocations.clear()
    torch.testing.assert_close(logits(model, first), logits(everywhere, first))


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="dora scales outputs of W before an invocation too"):
        veneer.LoRA(invocation=INVOCATION, dora=True)
    for text in ("[5, 9]", "[ 5,009 ]", "[5,9]"):
        assert veneer.LoRA(invocation=text).invocation == INVOCATION
    for text in ("[٣]", "[5,]", "[-5]", f"[{'9' * 5000}]"):
        assert veneer.LoRA(invocation=text).invocation == text
    for wrong in ([], "", 5, {3: 4}, ["a"], [[3]], [-1], [True]):
        with pytest.raises(ConfigError, match=r"invocation is .*, but must be a text, or the ids"):
            veneer.LoRA(invocation=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'say' is a text; give its token ids, or a tokenizer"):
        veneer.attach(tiny("llama"), veneer.LoRA(invocation="say"))
    with pytest.raises(ConfigError, match=rf"has the tokens {VOCAB}, and the model {VOCAB}"):
        veneer.attach(tiny("llama"), veneer.LoRA(invocation=[3, VOCAB]))
    for targets in ("lm_head", "embed_tokens"):
        with pytest.raises(ConfigError, match=f"linear layers of the decoder's.*{targets}"):
            veneer.attach(tiny("llama"), veneer.LoRA(targets=targets, invocation=INVOCATION))
    with pytest.raises(ConfigError, match="experts"):
        veneer.attach(tiny("mixtral"), veneer.LoRA(targets="all", invocation=INVOCATION))
    model = activated()
    with pytest.raises(veneer.AdapterError, match="a merged weight would act on all tokens"):
        veneer.merge(model)
    with pytest.raises(AdapterError, match="give the model input_ids in place of embeddings"):
        model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
    with pytest.raises(AdapterError, match="an invocation, say"):
        use_rows(model, ["default", None])
    fresh = veneer.attach(tiny("llama"), veneer.LoRA(invocation=INVOCATION))
    with pytest.raises(AdapterError, match="this layer was called alone"):
        fresh.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, fresh.config.hidden_size))


def test_a_text_becomes_its_tokens():
    config = tokenized(veneer.LoRA(invocation="ab"), tokenizer())
    assert config.invocation == tuple(tokenizer()("ab", add_special_tokens=False)["input_ids"])
    model = veneer.attach(tiny("llama"), veneer.LoRA(invocation="ab"), tokenizer=tokenizer())
    assert veneer.adapters(model)["default"].invocation == config.invocation


def test_detached_it_leaves_nothing():
    model = activated()
    assert invoked(model) == ["default"]
    twin = copy.deepcopy(model)
    own = row(3)
    expected = logits(model, own)
    veneer.detach(model)
    assert not active_adapters_of(model).acts_on
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(logits(model, own), logits(tiny("llama"), own))
    assert torch.equal(logits(twin, own), expected)  # which has its own


@pytest.mark.parametrize("format", ["native", "peft"])
def test_stored_and_loaded(format, tmp_path):
    model, own = activated(), row(4)
    veneer.save(model, tmp_path / "adapter", format=format)
    loaded = veneer.load(tiny("llama"), tmp_path / "adapter")
    assert veneer.adapters(loaded)["default"].invocation == INVOCATION
    assert torch.equal(logits(loaded, own), logits(model, own))
    if format == "peft":
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert "Activated LoRA of rank 3" in card
        assert "It acts from the last occurrence of the tokens 5, 9 on in each row" in card


def test_peft_s_file_with_more_is_refused(tmp_path):
    """Modules to save would act before the invocation too, unlike the base's own blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            alora_invocation_tokens=[*INVOCATION],
            task_type="CAUSAL_LM",
        )
        theirs = peft.get_peft_model(tiny("qwen2"), config)
        theirs.save_pretrained(tmp_path)
    with pytest.raises(veneer.AdapterError, match="modules to save, which would act before"):
        veneer.load(tiny("qwen2"), tmp_path, force=True)


def test_checkpointed_layers_act_as_in_their_own_pass():
    """Or two passes before a backward pass are refused: layers that are computed again would act
    as in the newest pass."""
    rows = [torch.tensor([row(3)]), torch.tensor([row(9)])]

    def gradients(model: Any) -> list[Tensor]:
        for own in rows:
            model(own, labels=own, use_cache=False).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    expected = gradients(activated().train())
    model = activated().train()
    model.activation_checkpointing_enable()
    model(rows[0], use_cache=False)  # whose graph nobody keeps
    loss = model(rows[0], labels=rows[0], use_cache=False).loss
    with pytest.raises(AdapterError, match="call backward before the next pass"):
        model(rows[1], use_cache=False)
    with pytest.raises(AdapterError, match="call backward before the next pass"), torch.no_grad():
        model(rows[1], use_cache=False)
    loss.backward()
    model.zero_grad()
    for ours, own in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, own)
