"""An empty folder to run in, and a stand-in for Colab's package."""

import sys
import types

import pytest

import bitllm_core as bit
from bitllm.dial import Machine
from bitllm.notebook import language


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITLLM_PRESET", raising=False)
    # measuring takes a second
    machine = Machine(bit.choose_device("cpu"), 1e12, compiles=True)
    monkeypatch.setattr("bitllm.notebook.settings.this_machine", lambda: machine)


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    """The language that a test chooses ends with it."""
    monkeypatch.setattr(language, "_chosen", "en")


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab; `colab.mount` is what drive.mount does."""
    drive = types.SimpleNamespace(mount=None)
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return drive
