"""Uploading to the Hugging Face hub."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from bitllm_core import library, require


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


def _hub_token() -> str | None:
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"]
    try:
        return importlib.import_module("google.colab.userdata").get("HF_TOKEN")
    except Exception:  # not on Colab, no such secret, or no permission to read it
        return None
