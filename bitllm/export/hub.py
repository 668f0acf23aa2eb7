"""The Hugging Face hub: uploading what was exported, and fetching it back."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bitllm_core import first_line, library, read_json, require

HF_FILES = ["config.json", "tokenizer.json", "model.safetensors"]
"""of a repository's transformers folder, what reading it back needs"""
READABLE = "Readable here: what bitllm exported, a transformers folder or one packed .safetensors"


def push_to_hub(
    path: str | Path, repo_id: str, token: str | None = None, private: bool = True
) -> str:
    """Upload a folder or a file to the Hugging Face hub, in one commit; returns the address.

    Other files that are in the repository already stay there. `publish` makes the folder as well.

    Args:
        path: what an export wrote.
        repo_id: OWNER/NAME; created if it is not there, `private` or not.
        token: with the right to write; default: HF_TOKEN from the environment or from Colab's
            secrets, else what the hub's own login keeps. It is neither printed nor stored.

    Raises:
        FileNotFoundError, ValueError: nothing at `path`, or no OWNER/NAME.
        ImportError: the package huggingface_hub is not installed.
        ConnectionError: the hub cannot be reached or refuses.
    """
    path = Path(path)
    require_name(repo_id)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; export first")
    hub = library("huggingface_hub", "an upload to the hub")
    api = hub.HfApi(token=token or _hub_token())
    commit: dict[str, Any] = {"repo_id": repo_id, "commit_message": f"Add {path.name}"}
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if path.is_dir():
            api.upload_folder(folder_path=path, **commit)
        else:
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **commit)
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        reason = why(error, repo_id)
        raise ConnectionError(f"{path.name} was not uploaded to {repo_id} ({reason})") from error
    return f"{api.endpoint}/{repo_id}"


def require_name(repo_id: str) -> None:
    """ValueError unless `repo_id` is OWNER/NAME."""
    owner, _, name = repo_id.partition("/")
    require(bool(owner and name) and "/" not in name, "repo_id", repo_id, "OWNER/NAME")


def on_this_disk(path: str | Path) -> Path:
    """hf:OWNER/NAME as `fetch_from_hub` brings it, anything else as it is; raises as that does."""
    name = os.fspath(path)
    return fetch_from_hub(name.removeprefix("hf:")) if name.startswith("hf:") else Path(path)


def fetch_from_hub(repo_id: str) -> Path:
    """The transformers folder or packed file of OWNER/NAME, on this disk.

    What is there is looked at before weights are fetched, and no other files are. Fetched once, it
    is read without a network too.

    Raises:
        ValueError: no OWNER/NAME, or nothing in it that this program exported.
        ImportError: the package huggingface_hub is not installed.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    require_name(repo_id)
    names, config = _names(repo_id), None
    if "config.json" in names:
        config = read_json(_fetched(repo_id, ["config.json"]) / "config.json") or {}
        if "bitllm" in config:
            return _fetched(repo_id, HF_FILES)
    packed = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if config is None and len(packed) == 1 and "adapter_config.json" not in names:
        return _fetched(repo_id, packed) / packed[0]
    raise ValueError(f"hf:{repo_id}: {what_is_there(repo_id, config, names)}")


def what_is_there(repo_id: str, config: dict[str, Any] | None, names: list[str]) -> str:
    """What a repository without a model of ours has, what is read here, and what to do."""
    if config is not None:
        made = (config.get("architectures") or ["no class named"])[0]
        found = f"a model of another program (model_type {config.get('model_type')}, {made})"
        remedy = "Use this one with transformers"
    elif any(name.endswith(".gguf") for name in names):
        found, remedy = "only GGUF files", f"Run it with llama.cpp: llama-cli -hf {repo_id}"
    else:
        found = f"no model, only {', '.join(names[:3])}" if names else "no files"
        remedy = "Check the name"
    if "tokenizer.json" in names:
        remedy += f", or train one with its tokenizer: --tokenizer hf:{repo_id}"
    return f"found {found}. {READABLE}. {remedy}"


def fetch_tokenizer(repo_id: str) -> Path:
    """The tokenizer.json of OWNER/NAME, on this disk; raises as `fetch_from_hub`."""
    require_name(repo_id)
    hub = library("huggingface_hub", f"the tokenizer of {repo_id}")
    try:
        return Path(hub.hf_hub_download(repo_id, "tokenizer.json", token=_hub_token()))
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise ConnectionError(
            f"no tokenizer.json of {repo_id} could be loaded from the hub ({why(error, repo_id)})"
        ) from error


def why(error: Exception, repo_id: str) -> str:
    """What an error of the hub's client means here, in one line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"gated: ask for access at https://huggingface.co/{repo_id}, then set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds:
        return "not found: check the name, and set HF_TOKEN if it is private"
    if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        return "refused: HF_TOKEN is missing or wrong, or may not do this"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set, and it is not in the cache: unset it, with a network"
    if kinds & {"LocalEntryNotFoundError", "TransportError", "ConnectionError", "Timeout"}:
        return "no answer from the hub, and not in the cache: check the network"
    return first_line(error)


class _Bar(tqdm):
    """Only in a terminal, and only until its download is over."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **{**options, "disable": None, "leave": False})


def _snapshot(repo_id: str, wanted: list[str], **options: Any) -> Path:
    hub = library("huggingface_hub", f"the model {repo_id} of the hub")
    options |= {"allow_patterns": wanted, "token": _hub_token(), "tqdm_class": _Bar}
    return Path(hub.snapshot_download(repo_id, **options))


def _fetched(repo_id: str, wanted: list[str]) -> Path:
    """The folder of the cache with these files."""
    try:
        return _snapshot(repo_id, wanted)
    except ImportError:
        raise
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise _not_loaded(repo_id, error) from error


def _names(repo_id: str) -> list[str]:
    """The files of a repository; where the hub does not answer, those that the cache has."""
    hub = library("huggingface_hub", f"the model {repo_id} of the hub")
    try:
        there = hub.HfApi(token=_hub_token()).model_info(repo_id).siblings or []
        return sorted(file.rfilename for file in there)
    except Exception as error:
        try:
            folder = _snapshot(repo_id, ["config.json"], local_files_only=True)
        except Exception:
            raise _not_loaded(repo_id, error) from error
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _not_loaded(repo_id: str, error: Exception) -> ConnectionError:
    reason = why(error, repo_id)
    return ConnectionError(f"the model {repo_id} could not be loaded from the hub ({reason})")


def _hub_token() -> str | None:
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"]
    try:
        return importlib.import_module("google.colab.userdata").get("HF_TOKEN")
    except Exception:  # not on Colab, no such secret, or no permission to read it
        return None
