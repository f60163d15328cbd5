"""A decoder layer's structure, read from one pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.adapter.linear import LoRALinear
from veneer.fused.analyse_latent import Latents, latents_of
from veneer.fused.norms import may_be_norm
from veneer.fused.structure import (
    AttentionStructure,
    FeedForwardStructure,
    LayerStructure,
    MixtureStructure,
)
from veneer.fused.watch import Attended, Call, Dropped, LayerPass, is_mixture, same_memory
from veneer.quant.weight import QuantizedLinear

ONE_OF_ALL, ONE_FOR_EACH = 1, 3  # projections that give q, k and v


class Unlike(Exception):
    """The layer is not made as those that are computed as two functions are; says why."""


def structure_of(watched: LayerPass) -> LayerStructure | str:
    """Return the structure of a layer, or why it cannot be computed as two functions."""
    try:
        return _structure(watched)
    except Unlike as why:
        return str(why)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, plain, quantized or adapted."""
    return isinstance(module, nn.Linear | Conv1D | QuantizedLinear | LoRALinear)


def _structure(watched: LayerPass) -> LayerStructure:
    x, attended = watched.x, watched.attended
    if attended is None or not watched.after:
        raise Unlike("it does not attend by transformers' interface or by torch's attention")
    before, after = _linears(watched.before), _linears(watched.after)
    mixtures = [name for name, child in watched.layer.named_children() if is_mixture(name, child)]
    if mixtures:
        after += [call for call in watched.after if call.path in mixtures]
        if [call.path for call in after[1:]] != mixtures or len(mixtures) > 1:
            raise Unlike(_why_no_half(after, mixtures))
        after.append(after[1])  # which is both what reads the half's input and what ends it
    norms = [call for call in (*watched.before, *watched.after) if may_be_norm(call.module)]
    latents = latents_of(before, norms) if before else None
    direct = len(before) in (ONE_OF_ALL, ONE_FOR_EACH) and _share_input(before)
    if not direct and latents is None:
        raise Unlike(f"q, k and v come from {_named(before)}")
    if len(after) not in (3, 4) or not _share_input(after[1:-1]):
        raise Unlike(f"after attention come {_named(after)}")
    output, *inputs, down = after
    first = _norm_before(before[0], norms)
    second = _norm_before(inputs[0], norms)
    begin = x if first is None else first.x
    if not same_memory(begin, x):
        raise Unlike("its attention does not read the layer's input")
    parallel = same_memory(inputs[0].x if second is None else second.x, x)
    of_latents = [] if latents is None else latents.norms
    q_norm, k_norm = _norms_of_heads(before, norms) if latents is None else (None, None)
    posts = [_norm_after(output, norms), _norm_after(down, norms)]
    if not parallel and second is None and posts[0] is not None and inputs[0].reads(posts[0].y):
        raise Unlike("its halves are not added to the residual")
    dropouts = [
        _dropout_after(post or last, watched.dropped)
        for last, post in zip((output, down), posts, strict=True)
    ]
    if mixtures and (parallel or dropouts[1]):
        raise Unlike("its mixture of experts reads the layer's input, or is dropped out")
    if len(watched.dropped) > sum(dropout is not None for dropout in dropouts):
        raise Unlike("it drops something else than what its halves add, or what attention sums")
    usual = (first, second, q_norm, k_norm, *posts)
    used = [*(call for call in usual if call is not None), *of_latents]
    if len({id(call) for call in used}) < len({id(call) for call in norms}):
        unknown = [call for call in norms if all(call is not other for other in used)]
        raise Unlike(f"it has a norm more than is known: {_named(unknown)}")
    if watched.clips:
        raise Unlike("it clips numbers that are large")
    if watched.returns_more:
        raise Unlike("it returns more than hidden states")
    return LayerStructure(
        attention=AttentionStructure(
            norm=_path(first),
            inputs=tuple(call.path for call in (before if latents is None else latents.inputs)),
            output=output.path,
            post_norm=_path(posts[0]),
            dropout=dropouts[0] or 0.0,
            q_norm=_path(q_norm),
            k_norm=_path(k_norm),
            **_sizes(before, latents, attended),
            **_options(attended, watched.layer),
        ),
        feed_forward=MixtureStructure(
            norm=_path(second), module=down.path, post_norm=_path(posts[1])
        )
        if mixtures
        else _feed_forward(
            *(watched.after, inputs, down),
            norm=_path(second),
            post_norm=_path(posts[1]),
            dropout=dropouts[1] or 0.0,
        ),
        parallel=parallel,
        returns_tuple=watched.returns_tuple,
    )


def _linears(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if is_linear(call.module)]


def _why_no_half(after: Sequence[Call], mixtures: Sequence[str]) -> str:
    """Return why a mixture is not all that comes after attention and its output projection.

    after: the linear layers and the mixtures that are called after attention.
    """
    if len(mixtures) > 1:
        return f"it has more than one mixture of experts: {', '.join(mixtures)}"
    linears = [call for call in after if call.path not in mixtures]
    if len(linears) == len(after):
        return f"{mixtures[0]}, which holds a router or experts, is not called after attention"
    return f"after attention come {_named(linears)}, and then its mixture of experts, {mixtures[0]}"


def _share_input(calls: Sequence[Call]) -> bool:
    return all(call.reads(calls[0].x) for call in calls)


def _norm_before(call: Call, norms: Sequence[Call]) -> Call | None:
    return next((norm for norm in norms if call.reads(norm.y)), None)


def _norm_after(call: Call, norms: Sequence[Call]) -> Call | None:
    return next((norm for norm in norms if norm.reads(call.y)), None)


def _dropout_after(call: Call, dropped: Sequence[Dropped]) -> float | None:
    return next((dropout.p for dropout in dropped if same_memory(dropout.x, call.y)), None)


def _norms_of_heads(before: Sequence[Call], norms: Sequence[Call]) -> tuple[Call | None, ...]:
    """Return the norms of q and of k."""
    of_each = [[norm for norm in norms if norm.reads(call.y)] for call in before]
    if len(before) == ONE_OF_ALL:
        (both,) = of_each
        if len(both) not in (0, 2):
            raise Unlike(f"q, k and v are normed by {_named(both)}")
        return (both[0], both[1]) if both else (None, None)
    q, k, v = of_each
    if v or len(q) > 1 or len(k) > 1:
        raise Unlike(f"q, k and v are normed by {_named([*q, *k, *v])}")
    return next(iter(q), None), next(iter(k), None)


def _sizes(before: Sequence[Call], latents: Latents | None, attended: Attended) -> dict[str, Any]:
    """Return the fields of AttentionStructure that numbers of heads and their sizes give."""
    heads, head_dim, value_dim = attended.q.shape[1], attended.q.shape[3], attended.v.shape[3]
    columns = [call.y.shape[-1] for call in before]
    latent = None
    if latents is not None:
        latent = latents.structure(attended)
        key_heads, fits = heads, latent is not None
    elif len(before) == ONE_FOR_EACH:
        key_heads, fits = columns[1] // head_dim, columns[2] * head_dim == columns[1] * value_dim
        fits &= columns[0] == heads * head_dim and columns[1] % head_dim == 0
    else:
        key_heads = (columns[0] // head_dim - heads) // 2
        fits = columns[0] == (heads + 2 * key_heads) * head_dim and value_dim == head_dim
    if not fits or not key_heads or heads % key_heads:
        raise Unlike(f"{_named(before)} give more than the q, k and v that attention reads")
    return {
        "heads": heads,
        "key_heads": key_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "latent": latent,
    }


def _options(attended: Attended, layer: nn.Module) -> dict[str, Any]:
    """Return the fields of AttentionStructure that the options of attention give."""
    options, head_dim = attended.options, attended.q.shape[3]
    scale, sinks = options.get("scaling"), options.get("s_aux")
    path = next((name for name, value in layer.named_parameters() if value is sinks), None)
    if sinks is not None and path is None:
        raise Unlike("its attention's sinks are no parameter of it")
    return {
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "window": options.get("sliding_window") or None,
        "softcap": options.get("softcap") or None,
        "sinks": path,
        "score_dropout": float(options.get("dropout") or 0.0),
    }


def _feed_forward(
    calls: Sequence[Call],
    inputs: Sequence[Call],
    down: Call,
    **of_the_half: Any,
) -> FeedForwardStructure:
    activations = [
        call
        for call in calls
        if not is_linear(call.module)
        and not may_be_norm(call.module)
        and not isinstance(call.module, nn.Dropout | nn.Identity)
    ]
    columns, inner = sum(call.y.shape[-1] for call in inputs), down.x.shape[-1]
    if len(activations) > 1 or columns not in (inner, 2 * inner):
        raise Unlike(f"between {_named(inputs)} and {down.path} is {_named(activations)}")
    return FeedForwardStructure(
        inputs=tuple(call.path for call in inputs),
        output=down.path,
        **of_the_half,
        activation=activations[0].path if activations else None,
        is_gated=columns == 2 * inner,
    )


def _path(call: Call | None) -> str | None:
    return None if call is None else call.path


def _named(calls: Sequence[Call]) -> str:
    return ", ".join(call.path for call in calls) or "nothing"
