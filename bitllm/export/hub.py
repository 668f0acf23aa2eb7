"""The Hugging Face hub: uploading what was exported, and fetching it back."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from bitllm_core import first_line, library, require


def push_to_hub(
    path: str | Path, repo_id: str, token: str | None = None, private: bool = True
) -> str:
    """Upload an exported folder or file to the Hugging Face hub; returns the address.

    Args:
        path: what an export wrote.
        repo_id: OWNER/NAME; created if it is not there, `private` or not.
        token: with the right to write; default: HF_TOKEN from the environment or from Colab's
            secrets, else what the hub's own login keeps. It is neither printed nor stored.

    Raises:
        FileNotFoundError, ValueError: nothing at `path`, or no OWNER/NAME.
        ImportError: the package huggingface_hub is not installed.
        OSError: the hub cannot be reached or refuses.
    """
    path = Path(path)
    require(repo_id.count("/") == 1, "repo_id", repo_id, "OWNER/NAME")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; export first")
    hub = library("huggingface_hub", "an upload to the hub")
    api = hub.HfApi(token=token or _hub_token())
    api.create_repo(repo_id, private=private, exist_ok=True)
    if path.is_dir():
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Add the model")
    else:
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=path,
            path_in_repo=path.name,
            commit_message=f"Add {path.name}",
        )
    return f"{api.endpoint}/{repo_id}"


def fetch_from_hub(repo_id: str) -> Path:
    """The folder or packed file of OWNER/NAME as `push_to_hub` left it there, on this disk.

    Raises:
        ValueError: no OWNER/NAME, or nothing in it that this program exported.
        ImportError: the package huggingface_hub is not installed.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    require(repo_id.count("/") == 1, "repo_id", repo_id, "OWNER/NAME")
    hub = library("huggingface_hub", f"the model {repo_id} of the hub")
    wanted = ["*.json", "*.safetensors"]
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=wanted, token=_hub_token()))
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise ConnectionError(
            f"the model {repo_id} could not be loaded from the hub ({first_line(error)})"
        ) from error
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file():
        return folder
    if len(files) != 1:
        raise ValueError(f"{repo_id}: expected one packed file or a folder that bitllm exported")
    return files[0]


def fetch_tokenizer(repo_id: str) -> Path:
    """The tokenizer.json of OWNER/NAME, on this disk; raises as `fetch_from_hub`."""
    require(repo_id.count("/") == 1, "repo_id", repo_id, "OWNER/NAME")
    hub = library("huggingface_hub", f"the tokenizer of {repo_id}")
    try:
        return Path(hub.hf_hub_download(repo_id, "tokenizer.json", token=_hub_token()))
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise ConnectionError(
            f"no tokenizer.json of {repo_id} could be loaded from the hub ({first_line(error)})"
        ) from error


def _hub_token() -> str | None:
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"]
    try:
        return importlib.import_module("google.colab.userdata").get("HF_TOKEN")
    except Exception:  # not on Colab, no such secret, or no permission to read it
        return None
