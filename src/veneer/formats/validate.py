"""Check a stored adapter against a model before anything is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.adapter.conv import why_not_adaptable
from veneer.adapter.invocation import invocation_problems
from veneer.adapter.method import Method
from veneer.adapter.new_tokens import is_tied, new_tokens_of
from veneer.adapter.targets import adaptable_layers, describe_base, is_named, resolve
from veneer.adapter.unfreeze import replaced_weights
from veneer.adapter.virtual import virtual_shape
from veneer.adapter.wrapper import unwrapped
from veneer.errors import MOST_PROBLEMS, ConfigError, listed, nearest, shortened
from veneer.formats.state import AdapterState, NewTokenRows, StoredLayer, StoredTokens
from veneer.models.block_buffers import whole
from veneer.models.description import Layer
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.models.score import score_of
from veneer.quant.stack import quantized_modules
from veneer.quant.weight import QuantizedLinear

# No trained weight comes near it, and beyond it products of a few numbers overflow.
LARGEST_NUMBER = 2.0**32
Shape = tuple[int, ...]


def validate(
    model: PreTrainedModel,
    state: AdapterState,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    force: bool,
    beside: bool = False,
    keys_values: Shape | None = None,
) -> list[str]:
    """Return every problem of an adapter on `model`: another base (unless `force`), missing and
    unknown keys, wrong shapes, values that are not finite.

    beside: whether it is to act on rows of batches beside others, which may adapt embedding and
    head, instead of being installed. keys_values: the shape (layers, 2, kv_heads, tokens, head_dim)
    of those of the model; without it, the model is run where a prefix needs them.
    """
    problems = [*_width(model, state), *(() if force else _foreign(model, state, tokenizer))]
    config = state.config
    if isinstance(config, LoRA):
        problems += _factors(model, state, config)
        problems += _invocation(model, state, config)
        problems += _base_weights(model, state)
        problems += _modules_to_save(model, state)
        problems += _trained_tokens(model, state)
    elif config.replaces_weights and quantized_modules(model):
        problems.append(f"{config.method} replaces weights, and those of this base are quantized")
    else:
        problems += _method(model, state, config, keys_values)
    if state.new_tokens is not None:
        problems += _new_tokens(model, state.new_tokens, tokenizer, beside=beside)
    return problems


def shared_tokens(
    model: PreTrainedModel, trained_tokens: Mapping[str, StoredTokens]
) -> dict[str, str]:
    """Return {head: embedding}, their paths, if the head uses the embedding's trained rows."""
    if not trained_tokens:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or not is_tied(embedding, head):
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    embedding_path, head_path = paths[id(embedding)], paths[id(head)]
    own = trained_tokens.get(head_path)
    shared = embedding_path in trained_tokens and (own is None or own.rows is None)
    return {head_path: embedding_path} if shared else {}


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain one of finite numbers that can be computed with; of one
    whose values were not read (on the meta device), whether it is plain."""
    plain = tensor.layout is torch.strided and tensor.is_floating_point()
    if tensor.ndim > 64:  # a file can have more dimensions than torch can compute with
        return False
    return plain and (
        tensor.is_meta or bool((tensor.to(torch.float32).abs() <= LARGEST_NUMBER).all())
    )


def finite_problems(name: str, tensor: Tensor) -> list[str]:
    """Return the problem with the values of the tensor called `name`, if there is one."""
    if is_finite(tensor):
        return []
    return [f"{name} has values that are not finite numbers of a sensible size"]


def shape_problems(name: str, tensor: Tensor, needed: Shape) -> list[str]:
    """Return the problem with the shape of the tensor called `name`, if there is one."""
    shape = tuple(tensor.shape)
    return [] if shape == needed else [f"{name} is {shape}, but needs to be {needed}"]


def _foreign(
    model: PreTrainedModel, state: AdapterState, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    own = fingerprint(model, tokenizer)
    differing = [key for key, mark in state.base_fingerprint.items() if own.get(key, mark) != mark]
    if differing:
        yield (
            f"it was trained on another base ({state.base_name or 'unnamed'}: its "
            f"{' and '.join(differing)} differ; force overrides this)"
        )


def _width(model: PreTrainedModel, state: AdapterState) -> Iterator[str]:
    """Yield, before all that follows from it, that a LoRA was made for a base of another width."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(state.config, LoRA) or not isinstance(width, int):
        return
    inputs = {x.path for x in describe_base(model).layers if x.is_linear and x.in_ == width}
    widths = {x.A.shape[-1] for x in state.layers() if x.path in inputs and x.A.ndim == 2}
    if len(widths) == 1 and widths != {width}:
        yield f"it was made for a base of width {widths.pop():,}, and this one has {width:,}"


def _method(
    model: PreTrainedModel, state: AdapterState, config: Method, keys_values: Shape | None
) -> Iterator[str]:
    """Yield the problems of replaced weights, or of virtual tokens."""
    try:
        if config.replaces_weights:
            weights = replaced_weights(model, config)
            needed: dict[str, Shape] = {key: tuple(w.shape) for key, w in weights.items()}
        elif config.method == "prefix" and keys_values is not None:
            assert config.virtual_tokens is not None
            needed = {"prefix": (*keys_values[:3], config.virtual_tokens, keys_values[4])}
        else:
            needed = {config.method: virtual_shape(model, config)}
    except ConfigError as error:
        yield str(error).rstrip(".")
        return
    if missing := [key for key in needed if key not in state.tensors]:
        yield f"weights are missing: {listed(missing)}"
    if foreign := [key for key in state.tensors if key not in needed]:
        likely = nearest(foreign[0], needed)
        yield f"none of the weights that train: {listed(foreign)}{likely}"
    for key, tensor in state.tensors.items():
        if key in needed:
            yield from shape_problems(key, tensor, needed[key])
            yield from finite_problems(key, tensor)


def _factors(model: nn.Module, state: AdapterState, config: LoRA) -> list[str]:
    problems: list[str] = []
    adaptable = [x for x in describe_base(model).layers if x.is_adaptable or x.is_matrix]
    by_path = {layer.path: layer for layer in adaptable}
    complete: set[str] = set()
    for stored in state.layers():
        path = stored.path
        complete.add(path)
        layer = by_path.get(path)
        if layer is None:
            problems.append(_why_no_layer(model, path, by_path, hint=len(problems) < MOST_PROBLEMS))
        elif stored.kind != layer.factor_kind:
            problems.append(f"{path} is a {type(layer.module).__name__}, of the other kind")
        elif isinstance(layer.module, nn.Conv2d) and (why := why_not_adaptable(layer.module)):
            problems.append(f"{path} is a convolution that cannot be adapted: {why}")
        else:
            try:
                problems += _layer(stored, config, layer)
            except ConfigError as error:  # a pattern takes too long, and would for the next layer
                return [*problems, str(error)]
    all_finite = _are_finite(state.tensors.values())
    for key, tensor in state.tensors.items():
        if key.rpartition(".")[0] not in complete:
            problems.append(f"{key} stands alone, without its other half")
        if not all_finite:
            problems += finite_problems(key, tensor)
    try:
        targets = {layer.path for layer in resolve(model, config, adaptable)}
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    else:
        meant = {path for path in complete if path in by_path and not by_path[path].is_matrix}
        # Earlier versions wrote `all` of adapters without stacks of experts, and PEFT does.
        named = {p for p in targets if not by_path[p].is_stack or is_named(config, p)}
        if missing := sorted(named - complete - _of_same_name(config, meant, by_path)):
            problems.append(f"weights are missing for {listed(missing)}")
        problems += [
            f"{path} has weights, but is not among the targets"
            for path in sorted(complete - targets)
        ]
    return problems


def _invocation(model: nn.Module, state: AdapterState, config: LoRA) -> list[str]:
    """Return what keeps an adapter from acting from its invocation on alone."""
    if config.invocation is None:
        return []
    if isinstance(config.invocation, str):
        return [f"its invocation is a text, {config.invocation!r}, and must be token ids"]
    stored = {layer.path for layer in state.layers()}
    adapted = [layer for layer in describe_base(model).layers if layer.path in stored]
    beside = {
        "modules to save": state.modules_to_save,
        "rows of single tokens": state.trained_tokens,
        "new tokens": state.new_tokens,
        "biases of its own": any(layer.bias is not None for layer in state.layers()),
    }
    return [
        *invocation_problems(model, config, adapted),
        *(
            f"it has {name}, which would act before its invocation too"
            for name, is_there in beside.items()
            if is_there
        ),
    ]


def _why_no_layer(model: nn.Module, path: str, by_path: Mapping[str, Layer], *, hint: bool) -> str:
    module = dict(model.named_modules()).get(path)
    if module is None:
        likely = nearest(path, by_path) if hint else ""
        return f"{shortened(path)} is no layer of this model{likely}"
    return f"{path} is a {type(module).__name__}, which cannot be adapted"


def _of_same_name(config: LoRA, adapted: set[str], by_path: Mapping[str, Layer]) -> set[str]:
    """Return the stacks of experts whose last name is a target that means adapted layers: earlier
    versions shortened the names of layers to such."""
    last_names = {path.rpartition(".")[2] for path in adapted}.intersection(config.targets)
    return {
        path
        for path, layer in by_path.items()
        if layer.is_matrix and layer.name in last_names and path not in config.targets
    }


def _layer(stored: StoredLayer, config: LoRA, layer: Layer) -> Iterator[str]:
    """Yield which of one layer's tensors are missing, superfluous, or of a wrong shape.

    Raises ConfigError if a pattern of the settings takes too long to match.
    """
    path, out = stored.path, (layer.shape[0],)
    config.scaling_of(path)  # for its ConfigError
    needed = layer.factor_shapes(config.rank_of(path), shared_a=config.shared_expert_a)
    if (shapes := _shapes(stored.A, stored.B)) != needed:
        yield f"{path} has A {shapes[0]} and B {shapes[1]}, but needs {_both(needed)}"
    if config.dora != (stored.magnitude is not None):
        yield f"{path} has {'no' if config.dora else 'a'} magnitude, unlike its settings"
    elif stored.magnitude is not None:
        yield from shape_problems(f"{path}.magnitude", stored.magnitude, out)
        if stored.kind == "parameter":
            yield f"{path} is a parameter, over which there is no DoRA"
    if stored.bias is not None:
        if stored.kind == "linear":
            yield from shape_problems(f"{path}.lora_bias", stored.bias, out)
        else:
            yield f"{path} has a lora_bias, but is no linear layer or convolution"
    if stored.start is not None and (shapes := _shapes(*stored.start)) != needed:
        yield f"{path} started at {_both(shapes)}, but needs {_both(needed)}"
    if config.has_start and stored.start is None and layer.is_linear:
        yield f"{path} does not say where it started"


def _base_weights(model: nn.Module, state: AdapterState) -> Iterator[str]:
    """Yield the weights of the base in the adapter's file that this base does not have."""
    own = base_parameters(model, every_name=True) if state.base_weights else {}
    for path, weight in state.base_weights.items():
        base = own.get(path)
        owner = None if base is None else model.get_submodule(path.rpartition(".")[0])
        with whole(owner):
            differs = base is None or not same_weight(base, weight)
        if differs:
            yield differs_from_base(path)


def same_weight(base: Tensor, weight: Tensor) -> bool:
    """Return whether two weights are equal in bfloat16: one of them may have been rounded to it.

    Of a weight whose values were not read only the shape counts.
    """
    if base.shape != weight.shape or weight.is_meta:
        return base.shape == weight.shape
    return torch.equal(base.detach().cpu().to(torch.bfloat16), weight.to(torch.bfloat16))


def differs_from_base(path: str) -> str:
    """Return the problem with a weight of the base in an adapter's file."""
    return f"it brings a {path} of its own that differs from the base's"


def _modules_to_save(model: nn.Module, state: AdapterState) -> Iterator[str]:
    """Yield the problems of weights that replace the base's own."""
    if not state.modules_to_save:
        return
    own, quantized = base_parameters(model, every_name=True), quantized_modules(model)
    own |= score_of(model)  # the head of a reward model, which no base has
    adapted = {layer.path for layer in state.layers()}
    for path, weight in state.modules_to_save.items():
        base, layer = own.get(path), path.removesuffix(".weight")
        if f"{layer}.original" in quantized or layer in quantized:
            yield f"it replaces {path}, which this base has quantized; load it without bits"
        elif base is None:
            yield f"it replaces {path}, which the base does not have{nearest(path, own)}"
        else:
            yield from shape_problems(path, weight, tuple(base.shape))
        if path in adapted or layer in adapted:
            yield f"it both replaces {path} and adapts it"
        yield from finite_problems(path, weight)


def _trained_tokens(model: PreTrainedModel, state: AdapterState) -> Iterator[str]:
    if not state.trained_tokens:
        return
    by_path = {layer.path: layer for layer in adaptable_layers(model)}
    adapted = {layer.path for layer in state.layers()}
    shared = shared_tokens(model, state.trained_tokens)
    for path, tokens in state.trained_tokens.items():
        layer = by_path.get(path)
        if layer is None or not (layer.kind == "embedding" or layer.is_head):
            yield f"it has rows of {path}, which is no embedding or head of this model"
            continue
        vocab, dim = layer.shape if layer.is_linear else layer.shape[::-1]
        if beyond := [str(i) for i in tokens.ids if not 0 <= i < vocab]:
            yield (
                f"it has rows for tokens {listed(beyond)} of {path}, but the base has {vocab}; "
                "resize its embedding before loading"
            )
        if len(set(tokens.ids)) < len(tokens.ids):
            yield f"it has more than one row of {path} for some tokens"
        if tokens.rows is not None:
            yield from shape_problems(
                f"its tensor of rows of {path}", tokens.rows, (len(tokens.ids), dim)
            )
            yield from finite_problems(f"its tensor of rows of {path}", tokens.rows)
        elif path not in shared:
            yield f"rows of {path} are missing, and this base has no other for them"
        if path in adapted or f"{path}.weight" in state.modules_to_save:
            yield f"it has rows of {path}, and changes all of it as well"
        if layer.is_head and getattr(layer.module, "bias", None) is not None:
            yield f"{path} has a bias, which PEFT leaves out where single rows train"


def _new_tokens(
    model: PreTrainedModel,
    new: NewTokenRows,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    beside: bool,
) -> Iterator[str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if beside:
        embedding, head = unwrapped(embedding), unwrapped(head)
    if new_tokens_of(model) is not None:
        yield "the model has new tokens already, and this adapter brings its own"
        return
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | QuantizedLinear):
        yield "it brings new tokens, which need a base whose embedding and head are not adapted"
        return
    vocab, dim = embedding.weight.shape
    if not 0 <= new.start <= vocab:
        yield f"its new tokens start at {new.start}, but the base has {vocab} tokens"
    if (new.head is None) != is_tied(embedding, head):
        yield "the base and it differ in whether embedding and head are tied"
    for owner, rows in (("embedding", new.embedding), ("head", new.head)):
        if rows is not None:
            name = f"its tensor of new rows of the {owner}"
            yield from shape_problems(name, rows, (len(new.tokens), dim))
            yield from finite_problems(name, rows)
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary.get(token) for token in new.tokens]
        needed = list(range(new.start, new.start + len(new.tokens)))
        are_there = any(i is not None for i in ids)
        if ids != needed and (are_there or len(tokenizer) != new.start):
            yield f"the tokenizer has other tokens where its new tokens start ({new.start})"


def _shapes(A: Tensor, B: Tensor) -> tuple[Shape, Shape]:
    return tuple(A.shape), tuple(B.shape)


def _both(shapes: tuple[Shape, Shape]) -> str:
    return f"{shapes[0]} and {shapes[1]}"


def _are_finite(tensors: Collection[Tensor]) -> bool:
    """Return whether one pass shows that all tensors pass `is_finite`; False if it cannot tell."""
    kinds = {(t.dtype, t.layout, t.device.type) for t in tensors}
    if kinds != {(torch.float32, torch.strided, "cpu")}:
        return False
    if any(t.ndim > 2 or not t.numel() for t in tensors):
        return False
    return bool(get_total_norm(list(tensors), torch.inf) <= LARGEST_NUMBER)
