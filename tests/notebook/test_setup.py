"""The report on the machine, and the repository that a notebook came from."""

import shutil
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from bitllm.notebook import setup
from bitllm.notebook.setup import environment_report, repository
from tests.notebook.colab import opened, server, variables

FORK = "https://github.com/some-one/my.fork/blob/dev/new/notebooks/01_train.ipynb"


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch):
    for name in ("BITLLM_REPOSITORY", "COLAB_JUPYTER_IP", "KMP_TARGET_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def session(monkeypatch):
    """Put Colab's server at an address."""

    def at(address):
        for name, value in variables(address).items():
            monkeypatch.setenv(name, value)

    return at


@pytest.fixture
def front_end(colab):
    """What Colab's page answers when it is asked for the notebook; change it in the test."""
    answers = {"get_ipynb": None}
    message = types.ModuleType("google.colab._message")

    def blocking_request(request, timeout_sec):
        assert timeout_sec == 2
        return answers[request]

    message.blocking_request = blocking_request
    sys.modules["google.colab"]._message = message
    return answers


def a_copy_of(*files):
    provenance = [{"file_id": file, "timestamp": 1} for file in files]
    return {"ipynb": {"cells": [], "metadata": {"colab": {"provenance": provenance}}}}


def test_the_report_names_what_decides_speed_and_bits():
    report = environment_report()
    for word in ("GPU:", "memory:", "disk:", "precision:", "torch.compile:", "ipywidgets"):
        assert word in report


def test_outside_colab_the_repository_is_unknown():
    assert repository() is None


def test_the_environment_variable_comes_first(monkeypatch, session):
    monkeypatch.setenv("BITLLM_REPOSITORY", "an-other/one@v1.0")
    session("127.0.0.1:9")
    assert repository() == "an-other/one@v1.0"


def test_a_notebook_opened_from_github_is_found_in_colabs_sessions(session):
    with server({"/api/sessions": opened(FORK)}) as (address, _):
        session(address)
        assert repository() == "some-one/my.fork@dev/new"


@pytest.mark.parametrize("hang", [False, True])
def test_a_copy_in_drive_is_traced_by_its_provenance(session, front_end, hang):
    front_end["get_ipynb"] = a_copy_of(
        "1AbCdEfGh", FORK, "https://github.com/a/b/blob/c/notebooks/d"
    )
    with server({"/api/sessions": opened("1AbCdEfGh")}, hang) as (address, asked):
        session(address)
        start = time.monotonic()
        assert repository() == "some-one/my.fork@dev/new"
        assert time.monotonic() - start < 20  # two seconds, on a busy machine
    assert asked == ["/api/sessions"]


@pytest.mark.parametrize("answer", [None, {}, {"ipynb": {"metadata": {}}}, a_copy_of("1AbC")])
def test_a_copy_without_provenance_is_unknown(front_end, answer):
    front_end["get_ipynb"] = answer
    assert repository() is None


def test_a_copy_in_drive_of_a_forks_notebook_gets_a_note(front_end, monkeypatch):
    archive = "https://github.com/OWNER/bitllm/archive/main.zip"
    monkeypatch.setattr(setup, "_installed_from", lambda: archive)
    front_end["get_ipynb"] = a_copy_of("https://github.com/OWNER/bitllm/blob/main/notebooks/a")
    assert environment_report().endswith(f"package:       {archive}")
    front_end["get_ipynb"] = a_copy_of(FORK)
    report = environment_report()
    assert "a copy of one in some-one/my.fork@dev/new" in report
    assert "https://github.com/some-one/my.fork/archive/dev/new.zip" in report


FAKE = """
import pathlib, sys
print("asked:", *sys.argv[1:])
if sys.argv[1] == "run":
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir()
    (out / "results.jsonl").write_text("{}")
sys.exit(sys.argv[1] == "prepare" and "nothing" in sys.argv)
"""


@pytest.fixture
def installed_from_an_archive(tmp_path, monkeypatch):
    """As in Colab: the package alone, and a zip of its repository where pip had it from."""
    tools = tmp_path / "repository" / "bitllm-main" / "tools"
    tools.mkdir(parents=True)
    (tools / "gpu_check.py").write_text(FAKE)
    path = shutil.make_archive(str(tmp_path / "main"), "zip", tmp_path / "repository")
    place = tmp_path / "site-packages" / "bitllm" / "notebook" / "setup.py"
    monkeypatch.setattr(setup, "__file__", str(place))
    monkeypatch.setattr(setup, "_installed_from", lambda: Path(path).as_uri())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_gpu_check_is_fetched_with_its_repository(installed_from_an_archive, tmp_path, capsys):
    found = setup.check_gpu(tmp_path / "found", "wikitext-2", 3, "versions")
    assert found.read_text() == "{}"
    asked = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert asked == ["prepare", "run", "report"]


def test_a_gpu_check_without_a_text_ends_there(installed_from_an_archive, tmp_path, capsys):
    with pytest.raises(OSError, match="no tokens of 'nothing' could be prepared"):
        setup.check_gpu(tmp_path / "found", "nothing")
    assert "asked: run" not in capsys.readouterr().out


def test_a_gpu_check_needs_a_gpu_and_the_repository(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"GPU=None: expected one that .* T4 GPU"):
        setup.check_gpu(tmp_path / "found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(setup, "__file__", str(tmp_path / "a" / "b" / "setup.py"))
    with pytest.raises(ValueError, match="package"):
        setup.check_gpu(tmp_path / "found")


def test_a_checkout_has_the_gpu_check_beside_it(tmp_path):
    assert (setup._tools(tmp_path) / "gpu_check.py").is_file()
