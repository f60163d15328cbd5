"""Adapters on the hub: hf:USER/NAME, perhaps with @REVISION, pulled and pushed by its own API."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from veneer.errors import AdapterError, VeneerWarning, shortened

SCHEME = "hf:"
# Tensors without pickles, and texts: nothing else of a repository is asked for.
PATTERNS = ("*.safetensors", "*.pt", "*.gguf", "*.json", "README.md", "SHA256SUMS")
PATIENCE = 10.0  # seconds for the hub to say what is there
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(path: Path) -> bool:
    """Return whether a path is the name of an adapter on the hub."""
    return str(path).startswith(SCHEME)


def pulled(path: Path) -> Path:
    """Return the local copy of an adapter of the hub, brought here if it is not.

    Where the hub does not answer, the copy that is here is taken, with a warning. Raises
    AdapterError where there is none, where the hub refuses, and for a repository of a model.
    """
    name, _, revision = str(path).removeprefix(SCHEME).partition("@")
    check_name(name)
    api = HfApi()
    try:
        # Asked once: to list files, the library would try for half a minute where nobody answers.
        about = api.model_info(name, revision=revision or None, timeout=PATIENCE)
    except Exception as error:  # of the libraries below, too, which change from version to version
        here = None if _refused(error) else _copy(name, revision)
        if here is None:
            raise AdapterError(f"{path} cannot be brought here: {why(error, api)}.") from error
        text = f"The hub does not say whether {path} has changed: {why(error, api)}. "
        warnings.warn(f"{text}The copy that is here is taken.", VeneerWarning, stacklevel=2)
        return here
    files = {sibling.rfilename for sibling in about.siblings or ()}
    if "config.json" in files and "adapter_config.json" not in files:
        raise AdapterError(f"{path} is a model, and an adapter is asked for.")
    try:
        # No copy instead: what came before this one broke off could be half of it.
        brought = snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
    except Exception as error:
        raise AdapterError(f"{path} cannot be brought here: {why(error, api)}.") from error
    return Path(brought)


def _copy(name: str, revision: str) -> Path | None:
    """Return the copy of a repository that is here, None where there is none."""
    try:
        here = snapshot_download(name, revision=revision or None, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(here)


def _refused(error: Exception) -> bool:
    """Return whether the hub has answered, and will answer so again."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


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
        return "the hub does not let you; `hf auth login` with a token that may"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
        return "it is not there, or not for everybody: `hf auth login`"
    reason = shortened(str(error).strip().partition("\n")[0].rstrip("."))
    return f"asking {api.endpoint} failed ({reason or type(error).__name__})"
