"""What is looked at before a request is taken: its tokens, and what its adapters mean now."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.errors import AdapterError, ContextExceeded, RequestError
from veneer.serve.engine.library import Library, Mix
from veneer.serve.engine.request import Request, Which


def check(request: Request, *, context: int, vocab: int) -> None:
    """Raise RequestError for a prompt that the context has no space for, or with tokens that the
    model does not have."""
    if len(request.tokens) + int(request.answers) > context:
        why = "leaves no room for an answer in" if request.answers else "is more than"
        raise ContextExceeded(
            f"The prompt has {len(request.tokens):,} tokens, which {why} the context of "
            f"{context:,}."
        )
    biased = [token for token, _ in request.adjustments.logit_bias]
    for tokens, param in ((request.tokens, None), (biased, "logit_bias")):
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            where = f"{param}: " if param else ""
            why = f"{where}{wrong[0]} is no token; the model's are 0 to {vocab - 1:,}."
            raise RequestError(why, param=param)


def mix_of(library: Library, which: Which) -> Mix:
    """Return the versions that names mean now, with their weights; versions as they are. Raises
    RequestError for a name that is not in the library, AdapterError for one that it refuses."""
    if which is None or isinstance(which, tuple):
        return which or ()
    weights: Mapping[str, float] = {which: 1.0} if isinstance(which, str) else which
    try:
        mix = tuple((library.info(name), float(w)) for name, w in weights.items())
    except AdapterError as error:
        raise RequestError(str(error)) from error
    if refusals := [entry.refusal for entry, _ in mix if entry.refusal]:
        raise AdapterError(" ".join(refusals))
    return mix
