"""`pip install .`, then the commands of the README in an empty folder."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the commands of a fresh environment are, which borrows torch and the like."""
    folder = tmp_path_factory.mktemp("install")
    source, environment = folder / "source", folder / "venv"
    source.mkdir()
    for name in ("bitllm_core.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bitllm", source / "bitllm", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
    packages = folder / "packages"
    subprocess.run([*pip, "--target", str(packages), str(source)], check=True)
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    paths = [packages, *map(Path, site.getsitepackages())]
    Path(found.stdout.strip(), "borrowed.pth").write_text("\n".join(map(str, paths)))
    return python, packages


@pytest.mark.skipif(sys.platform == "win32", reason="paths as POSIX has them")
def test_what_pip_installs_trains_generates_and_exports(installed, tmp_path):
    python, packages = installed
    assert (packages / "bitllm" / "export" / "page.html").is_file()
    assert (packages / "bitllm" / "export" / "page" / "chat.js").is_file()
    for source in (ROOT / "bitllm" / "cpu").glob("*.[ch]"):
        assert (packages / "bitllm" / "cpu" / source.name).is_file()
    assert (packages / "bitllm" / "corpora" / "es.json").is_file()
    program = (packages / "bin" / "bitllm").read_text()
    (tmp_path / "bitllm").write_text(f"#!{python}\n" + program.split("\n", 1)[1])
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for arguments in (
        ["train", "--preset", "ci", "--max-steps", "3", "--out", "r"],
        ["generate", "--model", "r", "--max-new-tokens", "5"],
        ["export", "--model", "r", "--to", "packed", "--out", "m.safetensors"],
    ):
        command = [str(python), str(tmp_path / "bitllm"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.safetensors").stat().st_size > 10_000
