"""llama.cpp for browsers, through wllama: fetched once, kept, and checked by hash."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from bitllm_core import first_line, write_atomically

log = logging.getLogger("bitllm")

VERSION = "3.8.1"
"""llama.cpp as WebAssembly (MIT). For a newer one, replace the hashes and run tests/export"""
CDN = "https://cdn.jsdelivr.net/npm/@wllama"
FILES = {
    "library": (
        "wllama/esm/index.cjs",
        "762520f305a85b290d5cd979aa287b3c4b768a5f483e21339ef70a052ae8dea4",
    ),
    "licence": (
        "wllama/LICENCE",
        "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720",
    ),
    "glue": (
        "wllama-compat/wasm/wllama.js",
        "2649eeb408988841c372e54805adfa25aed5d02f850c09add78c2f3ac0f3fce1",
    ),
    "engine": (
        "wllama-compat/wasm/wllama.wasm",
        "2db3f67d0bcc19cdf8f14f129e46cab691bff898954808f8a2dc4c586eb5bb68",
    ),
}
"""part of the page -> package/file, sha256"""


def load_runtime(folder: str | Path | None = None) -> dict[str, bytes]:
    """Part of the page -> its bytes, exactly those that this program was tested with.

    Args:
        folder: node_modules/@wllama; default: the cache, filled from npm or the CDN if need be.

    Raises:
        FileNotFoundError, ValueError: a file of `folder` is missing or has another hash.
        OSError: nothing is in the cache and nothing can be fetched.
    """
    if folder is not None:
        return read_runtime(Path(folder))
    cache = _cache_folder() / f"wllama-{VERSION}"
    try:
        return read_runtime(cache)
    except (ValueError, FileNotFoundError):  # not fetched yet, or damaged
        fetch_runtime(cache)
    return read_runtime(cache)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(cache) if cache else Path.home() / ".cache") / "bitllm"


def read_runtime(folder: Path) -> dict[str, bytes]:
    parts = {}
    for part, (file, expected) in FILES.items():
        try:
            data = (folder / file).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder / file}: no such file; expected wllama {VERSION} as npm lays it out "
                f"({_install_command()}, then node_modules/@wllama)"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / file}: refused, its sha256 is {found} instead of {expected}; "
                f"expected the file of wllama {VERSION}, unchanged"
            )
        parts[part] = data
    return parts


def _install_command() -> str:
    return f"npm install @wllama/wllama@{VERSION} @wllama/wllama-compat@{VERSION}"


def fetch_runtime(folder: Path) -> None:
    """Put llama.cpp for browsers into `folder`, from npm or else from the CDN."""
    log.info(f"downloading llama.cpp for browsers (wllama {VERSION}), once, into {folder}")
    reasons = []
    for fetch in (_fetch_from_npm, _fetch_from_cdn):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                fetch(Path(scratch))
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(first_line(error))
                continue
            for part, data in read_runtime(Path(scratch)).items():  # a wrong hash ends it here
                file = folder / FILES[part][0]
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, data)
            return
    raise OSError(
        f"llama.cpp for browsers could not be fetched ({'; '.join(reasons)}). On a machine with a "
        f"network: {_install_command()}; then pass the folder node_modules/@wllama as runtime"
    )


def _write(folder: Path, file: str, data: bytes) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(data)


def _fetch_from_npm(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("no npm on the path")
    packages = ("wllama", "wllama-compat")
    command = [npm, "pack", "--silent", *(f"@wllama/{name}@{VERSION}" for name in packages)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    for file, _ in FILES.values():
        package, _, inside = file.partition("/")
        with tarfile.open(folder / f"wllama-{package}-{VERSION}.tgz") as archive:
            member = archive.extractfile(f"package/{inside}")
            if member is not None:
                _write(folder, file, member.read())


def _fetch_from_cdn(folder: Path) -> None:
    for file, _ in FILES.values():
        package, _, inside = file.partition("/")
        with urllib.request.urlopen(f"{CDN}/{package}@{VERSION}/{inside}", timeout=60) as answer:
            _write(folder, file, answer.read())
