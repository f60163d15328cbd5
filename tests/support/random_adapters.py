"""Adapters with values that matter, and rows of random tokens to train and measure them on."""

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from support.tiny_models import VOCAB
from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.new_tokens import NewTokens, add_tokens
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.virtual import Prefix, PrefixMLP, Prompt
from veneer.data.encode import UNLABELLED, Example
from veneer.models.fingerprint import base_parameters
from veneer.quant.stack import QuantizedStack, quantized_weights

NEW_TOKENS = ("veneer", "lacquer", "walnut")


def ids(rows: int = 2, tokens: int = 12, *, vocabulary: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(
        3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, use_cache=False).logits


def shake(model: PreTrainedModel, *, seed: int = 1, size: float = 0.1) -> PreTrainedModel:
    """Give A and B of every adapter random values, so that it changes what the model says, and move
    all else that adapters have from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for saved in active_adapters_of(model).modules_to_save.values():
            for weight in saved.values():
                weight.add_(size * torch.randn(weight.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, Adapter):
                for weight in (module.lora_A, module.lora_B):
                    weight.copy_(size * torch.randn(weight.shape, generator=generator))
                if module.magnitude is not None:
                    noise = torch.randn(module.magnitude.shape, generator=generator)
                    module.magnitude.mul_(1 + size * noise)
                if module.lora_bias is not None:
                    noise = torch.randn(module.lora_bias.shape, generator=generator)
                    module.lora_bias.add_(size * noise)
            elif isinstance(module, TrainedTokens):
                module.rows.add_(size * torch.randn(module.rows.shape, generator=generator))
            elif isinstance(module, Prefix | PrefixMLP | Prompt):
                for weight in module.parameters():
                    weight.add_(3 * size * torch.randn(weight.shape, generator=generator))
    return model


def embedding_name(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    return path.rpartition(".")[2]


def targets_named(model: PreTrainedModel, which: str | Sequence[str]) -> list[str]:
    """Return `which` as targets, where "embedding" stands for what this model calls its own."""
    match which:
        case "embedding":
            return [embedding_name(model)]
        case "everything":
            return ["all", embedding_name(model)]
        case str():
            return [which]
        case _:
            return list(which)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all that the base is made of, quantized or not, by the base's own names."""
    codes = {}
    for path, weight in quantized_weights(model).items():
        base_path = path.removesuffix(".original")
        if isinstance(weight, QuantizedStack):
            each = {f"{base_path}.{e}": expert for e, expert in enumerate(weight.experts)}
        else:
            each = {base_path: weight}
        for own_path, one in each.items():
            codes |= {f"{own_path}.{name}": t.clone() for name, t in one.tensors().items()}
    own = base_parameters(model, every_name=True)
    return codes | {name: weight.detach().clone() for name, weight in own.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, in relation to b."""
    return float((a - b).norm() / b.norm())


def examples(
    lengths: list[int], *, seed: int = 0, vocabulary: int = VOCAB, learnt: float = 0.6
) -> list[Example]:
    """Return rows of random tokens, of which a random part is learnt, but at least the last."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths, 1):
        tokens = torch.randint(3, vocabulary, (length,), generator=generator)
        ignored = torch.rand(length, generator=generator) > learnt
        ignored[0], ignored[-1] = True, length == 1
        labels = tokens.masked_fill(ignored, UNLABELLED)
        rows.append(Example(tokens.tolist(), labels.tolist(), f"row:{number}", 0))
    return rows


def with_invocation(tokens: Tensor, invocation: Sequence[int]) -> Tensor:
    """Return a row with an invocation in its first half and another behind it, as far as it has
    space for them. The second is the last, from which on an adapter acts."""
    tokens = tokens.clone()
    for place in (len(tokens) // 6, len(tokens) // 3) if invocation else ():
        if place + len(invocation) <= len(tokens):
            tokens[place : place + len(invocation)] = torch.tensor(invocation)
    return tokens


def tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters, with `size` tokens in all."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(32 + i): 3 + i for i in range(size - 3)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def with_new_tokens(model: PreTrainedModel, tokens: PreTrainedTokenizerFast) -> NewTokens:
    """Add NEW_TOKENS, each with rows of its own that no mean of old rows could be."""
    new = add_tokens(model, tokens, NEW_TOKENS)
    with torch.no_grad():
        for rows in new.parameters():
            rows.add_(0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)))
    return new


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)
