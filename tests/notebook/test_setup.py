"""The report on the machine, and the repository that a notebook came from."""

import sys
import time
import types

import pytest

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
