"""A base on the hub: one question whether it is there, and the copy on this disk where no answer
comes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from veneer.errors import ModelError, nearest
from veneer.models.locate import BUILT_IN

# The libraries wait for 10 s, several times over for each of a model's files.
SECONDS = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 5)


@cache
def on_hub(name: str) -> Path | str:
    """Return `name` where the hub has it, else the directory of its copy in the local cache.

    The hub is asked once. Raises ModelError where there is neither.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
        return name
    except Exception as error:  # of the libraries below, too, which change from version to version
        copy = try_to_load_from_cache(name, "config.json")
        if isinstance(copy, str):
            return Path(copy).parent
        why = _why(error)
    cached = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    names = [*BUILT_IN, *(path.name.removeprefix("models--").replace("--", "/") for path in cached)]
    raise ModelError(
        f"{name!r} is no directory here, and as a hub name {why}. Name a directory, a .gguf file, "
        f"or a built-in base ({', '.join(BUILT_IN)}){nearest(name, names)}."
    )


def _why(error: Exception) -> str:
    """Return what kept a name from being found."""
    if isinstance(error, EntryNotFoundError):
        return "it has no config.json, so it is no model of transformers"
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        return "it is not there, or not for everybody: such models need `hf auth login`"
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return f"it cannot be looked up, for {constants.ENDPOINT} was not reached ({reason})"
