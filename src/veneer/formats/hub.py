"""Adapters on the hub: hf:USER/NAME, perhaps with @REVISION, pulled and pushed by its own API."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from veneer.errors import AdapterError, shortened

SCHEME = "hf:"
# Tensors without pickles, and texts: nothing else of a repository is asked for.
PATTERNS = ("*.safetensors", "*.pt", "*.gguf", "*.json", "README.md", "SHA256SUMS")
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(path: Path) -> bool:
    """Return whether a path is the name of an adapter on the hub."""
    return str(path).startswith(SCHEME)


def pulled(path: Path) -> Path:
    """Return the local copy of an adapter of the hub, brought here if it is not.

    Where the hub is not reached, the copy that is here is taken. Raises AdapterError where there is
    none, and for a repository of a model.
    """
    name, _, revision = str(path).removeprefix(SCHEME).partition("@")
    check_name(name)
    api = HfApi()
    try:
        files = api.list_repo_files(name, revision=revision or None)
        if "config.json" in files and "adapter_config.json" not in files:
            raise AdapterError(f"{path} is a model, and an adapter is asked for.")
        here = snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
    except AdapterError:
        raise
    except Exception as error:  # of the libraries below, too, which change from version to version
        try:
            here = snapshot_download(name, revision=revision or None, local_files_only=True)
        except Exception:
            raise AdapterError(f"{path} cannot be brought here: {why(error, api)}.") from error
    return Path(here)


def check_name(name: str) -> None:
    """Raise AdapterError for what is no name of a repository."""
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no name on the hub: write USER/NAME.")


def push(directory: Path, name: str, *, private: bool, message: str) -> str:
    """Upload a directory as a repository of the hub, and return its address.

    Raises AdapterError where the hub does not take it.
    """
    check_name(name)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    except Exception as error:
        raise AdapterError(f"{name} was not pushed: {why(error, api)}.") from error
    return f"{api.endpoint}/{name}"


def why(error: Exception, api: HfApi) -> str:
    """Return what kept the hub from doing what it was asked for."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the hub does not let you; `hf auth login` with a token that may write"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
        return "it is not there, or not for everybody: `hf auth login`"
    reason = shortened(str(error).strip().partition("\n")[0].rstrip("."))
    return f"{api.endpoint} says or does not say why ({reason or type(error).__name__})"
