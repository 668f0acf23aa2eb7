"""The notebooks' set-up cell: it finds the package, or installs it from the right repository."""

import io
import os
import shutil
import subprocess
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import jupytext
import pytest

from tests.conftest import ROOT
from tests.notebook.colab import opened, server, variables
from tests.notebook.kernels import put_package

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
FORK = "https://github.com/some-one/my.fork/blob/dev/new/notebooks/01_train.ipynb"
FORKS_ARCHIVE = "https://github.com/some-one/my.fork/archive/dev/new.zip"
SET_UP = ("# @title Set up", "# @title Preparar")
FALLBACK = "https://github.com/OWNER/bitllm/archive/main.zip"


def set_up_cell(source):
    """Its code; the title, which each notebook has in its own language, is not part of it."""
    cells = [cell.source.partition("\n") for cell in jupytext.read(source).cells]
    return next(code for title, _, code in cells if title in SET_UP)


CELL = set_up_cell(SOURCES[0])
ONLY_PRINTED = """
import subprocess
really_run = subprocess.run
def run(command, **options):
    return print(*command) if "pip" in command else really_run(command, **options)
subprocess.run = run
"""
"""Before the cell: the pip command is printed instead of run"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def run(python, code, folder, **environment):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "COLAB_JUPYTER_IP", "KMP_TARGET_PORT", "BITLLM_REPOSITORY")
    }
    (folder / "cell.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [python, "cell.py"],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def installs(python, folder, **environment):
    """The last argument of the pip command that the cell comes to; empty without one."""
    done = run(python, ONLY_PRINTED + CELL, folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition(" ")[2]


def test_the_cell_is_short_and_the_same_in_every_notebook():
    assert {set_up_cell(source) for source in SOURCES} == {CELL}
    assert len(CELL.splitlines()) <= 15
    assert max(map(len, CELL.splitlines())) <= 100


@pytest.mark.parametrize("place", [".", "notebooks"])
def test_a_checkout_is_used_as_it_is(python, tmp_path, place):
    put_package(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    assert installs(python, tmp_path / place, BITLLM_REPOSITORY="some/other@main") == ""


def test_outside_colab_the_package_comes_from_the_notebooks_own_repository(python, tmp_path):
    (tmp_path / "bitllm").mkdir()  # such as a clone: no package by itself
    assert installs(python, tmp_path) == FALLBACK


def test_opened_from_a_forks_branch_the_package_is_the_forks(python, tmp_path):
    with server({"/api/sessions": opened(FORK)}) as (address, asked):
        assert installs(python, tmp_path, **variables(address)) == FORKS_ARCHIVE
        given = {"BITLLM_REPOSITORY": "an-other/one@v1.0", **variables(address)}
        wanted = "https://github.com/an-other/one/archive/v1.0.zip"
        assert installs(python, tmp_path, **given) == wanted
    assert set(asked) == {"/api/sessions"}


@pytest.mark.parametrize(
    "answer",
    [
        opened("1AbCdEfGh"),
        opened("https://github.com/some-one/my.fork/blob/main/elsewhere.ipynb"),
        b"[]",
        b"<html>",
    ],
    ids=["a copy in Drive", "another folder", "no session", "no JSON"],
)
def test_what_does_not_name_a_repository_is_passed_over(python, tmp_path, answer):
    with server({"/api/sessions": answer}) as (address, _):
        assert installs(python, tmp_path, **variables(address)) == FALLBACK


def test_a_server_that_hangs_costs_two_seconds(python, tmp_path):
    with server({}, hang=True) as (address, asked):
        start = time.monotonic()
        assert installs(python, tmp_path, **variables(address)) == FALLBACK
        assert time.monotonic() - start < 20  # of a busy machine
    assert asked == ["/api/sessions"]


def archive_of_the_checkout():
    """The checkout as GitHub packs it: in a folder named after repository and branch."""
    buffer = io.BytesIO()
    names = ["bitllm_core.py", "pyproject.toml", "README.md", "LICENSE"]
    parts = [p for p in (ROOT / "bitllm").rglob("*") if p.suffix in (".py", ".c", ".h", ".html")]
    with zipfile.ZipFile(buffer, "w") as packed:
        for path in [*(ROOT / name for name in names), *parts]:
            packed.write(path, Path("my.fork-dev-new") / path.relative_to(ROOT))
    return buffer.getvalue()


def test_the_archive_is_installed_without_network(python, tmp_path):
    """Really, by pip, into an environment that has all but the package."""
    shutil.copytree(python.parents[1], tmp_path / "environment", symlinks=True)
    base = {"base": str(tmp_path / "environment")}
    site = Path(sysconfig.get_path("purelib", "posix_prefix", base))
    below = tmp_path / "below"
    below.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "bitllm" not in path.name and path.suffix != ".pth":
            (below / path.name).symlink_to(path)
    (site / "below.pth").write_text(f"{below}\n", encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    path = "/some-one/my.fork/archive/dev/new.zip"
    pages = {"/api/sessions": opened(FORK), path: archive_of_the_checkout()}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_CACHE_DIR": "1"}
    with server(pages) as (address, asked):
        code = CELL.replace("https://github.com/", f"http://{address}/")
        code += "\nimport bitllm as bit\nprint(bit.__file__, bit.Settings('ci').preset_name)"
        code += "\nprint(bit.environment_report())"
        done = run(
            tmp_path / "environment" / "bin" / "python",
            code,
            folder,
            **offline,
            **variables(address),
        )
    assert done.returncode == 0, done.stderr
    assert f"{site / 'bitllm' / '__init__.py'} ci" in done.stdout
    assert f"http://{address}{path}" in done.stdout
    assert asked[-1] == path
    assert len(list(site.glob("*.dist-info"))) == 1  # and nothing else


def test_what_cannot_be_installed_says_where_to_go_on(tmp_path, python):
    code = CELL.replace("https://github.com/", "http://127.0.0.1:9/")
    done = run(python, code, tmp_path)
    assert done.returncode == 1
    assert "if this fails: open bitllm_one_cell.ipynb" in done.stderr
