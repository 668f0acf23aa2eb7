"""llama.cpp for browsers: fetched once, and known by its hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from bitllm_core import first_line, say, write_atomically

_WLLAMA = "3.8.1"  # llama.cpp as WebAssembly (MIT); newer: new hashes, and run tests/test_page.py
_WLLAMA_CDN = "https://cdn.jsdelivr.net/npm/@wllama"
_WLLAMA_FILES = {  # part of the page -> package/file, sha256
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


def _page_runtime(runtime: str | Path | None) -> dict[str, bytes]:
    """Part of the page -> its bytes, which are those that this program was tested with."""
    folder = Path(runtime) if runtime else _cache_folder() / f"wllama-{_WLLAMA}"
    if runtime is None:
        try:
            return _read_runtime(folder)
        except (ValueError, FileNotFoundError):  # not fetched yet, or spoilt
            _fetch_runtime(folder)
    return _read_runtime(folder)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(cache) if cache else Path.home() / ".cache") / "bitllm"


def _read_runtime(folder: Path) -> dict[str, bytes]:
    parts = {}
    for part, (file, expected) in _WLLAMA_FILES.items():
        try:
            data = (folder / file).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder / file}: no such file; expected wllama {_WLLAMA} as npm lays it out "
                f"(npm install @wllama/wllama@{_WLLAMA} @wllama/wllama-compat@{_WLLAMA}, then "
                "node_modules/@wllama)"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / file}: refused, its sha256 is {found} instead of {expected}; "
                f"expected the file of wllama {_WLLAMA}, unchanged"
            )
        parts[part] = data
    return parts


def _fetch_runtime(folder: Path) -> None:
    """Put llama.cpp for browsers into `folder`, with npm or else from the CDN."""
    say(f"fetching llama.cpp for browsers (wllama {_WLLAMA}), once, into {folder}")
    reasons = []
    for fetch in (_fetch_with_npm, _fetch_from_cdn):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                fetch(Path(scratch))
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(first_line(error))
                continue
            _read_runtime(Path(scratch))  # a wrong hash ends it here
            for file, _ in _WLLAMA_FILES.values():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / file, (Path(scratch) / file).read_bytes())
            return
    raise OSError(
        f"llama.cpp for browsers could not be fetched ({'; '.join(reasons)}). Where there is a "
        f"network: npm install @wllama/wllama@{_WLLAMA} @wllama/wllama-compat@{_WLLAMA}; then "
        "give the folder node_modules/@wllama as runtime"
    )


def _fetch_with_npm(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("no npm on the path")
    packages = ("wllama", "wllama-compat")
    command = [npm, "pack", "--silent", *(f"@wllama/{name}@{_WLLAMA}" for name in packages)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    for name in packages:
        with tarfile.open(folder / f"wllama-{name}-{_WLLAMA}.tgz") as archive:
            for file, _ in _WLLAMA_FILES.values():
                package, _, inside = file.partition("/")
                member = archive.extractfile(f"package/{inside}") if package == name else None
                if member is not None:
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(member.read())


def _fetch_from_cdn(folder: Path) -> None:
    for file, _ in _WLLAMA_FILES.values():
        package, _, inside = file.partition("/")
        address = f"{_WLLAMA_CDN}/{package}@{_WLLAMA}/{inside}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(answer.read())
