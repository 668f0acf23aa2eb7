"""A tiny model, corpus and tokenizer, and a clean slate around every test."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

# before torch starts: several test processes with several threads each only wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import bitllm_core as bit
from tests import tiny, warm

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


LONG = ("test_gpu_check", "test_browser", "test_notebooks", "test_distributed", "test_reliability")


def pytest_xdist_auto_num_workers(config):
    """Two for each core: many tests wait for a browser, a process or a clock."""
    return 2 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    """Files of long tests first, so that no process is alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With BITLLM_NO_SKIPS, as in .ci/run, a test that is skipped has failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("BITLLM_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"BITLLM_NO_SKIPS forbids to skip: {report.longrepr[-1]}"
    return report


@pytest.fixture(autouse=True)
def _restore_global_state():
    seed, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    torch.set_rng_state(seed)
    torch.set_default_dtype(dtype)


class _ToStderr(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), file=sys.stderr)  # the one that capsys has put there


@pytest.fixture(autouse=True)
def _log_to_stderr(monkeypatch):
    monkeypatch.setattr(bit.log, "handlers", [_ToStderr()])
    monkeypatch.setattr(bit.log, "propagate", False)
    monkeypatch.setattr(bit.log, "level", logging.INFO)
    bit.log.setLevel(logging.INFO)


@pytest.fixture
def tiny_config():
    return tiny.MODEL


@pytest.fixture
def tiny_train():
    return tiny.TRAIN


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A text of some 12 kB that is easy to learn, with blank lines and a second alphabet."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [f"{i} cats sat on {i + 1} mats.\n\n  Пять котов, {i % 7} 🐱!\n" for i in range(250)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_corpus):
    return bit.train_tokenizer([tiny_corpus.read_text(encoding="utf-8")], 300)


@pytest.fixture(scope="session")
def seed_script():
    """The seed guide's model classes, as its script defines them."""
    path = Path(__file__).parent / "seed_model.py"
    spec = importlib.util.spec_from_file_location("seed_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_cli():
    """Run the command line in a process of its own, as a user does."""

    def run(*arguments, **options):
        command = [sys.executable, str(ROOT / "bitllm_core.py"), *map(str, arguments)]
        options = {"capture_output": True, "text": True, "encoding": "utf-8", **options}
        return warm.run(command, timeout=300, check=False, **options)

    return run


def weights_of(folder):
    """Model and optimizer tensors of a run's newest checkpoint, by name."""
    found = bit.newest_checkpoint(Path(folder) / "checkpoints")
    tensors = dict(found["model"])
    for i, optimizer in enumerate(found["optimizers"]):
        for key, state in optimizer["state"].items():
            tensors |= {f"{i}.{key}.{name}": value for name, value in state.items()}
    return tensors


def state_of(folder):
    """All that a resumed run takes over: tensors, random states, counters, best record."""
    found = bit.newest_checkpoint(Path(folder) / "checkpoints")
    tensors = weights_of(folder)
    tensors |= {f"trits.{name}": value for name, value in found["trits"].items()}
    tensors["rng"] = found["rng"]["torch"]
    names = ("step", "skipped", "loss", "val_loss", "best_val_loss", "best_step")
    names += ("evals_since_best",)
    values = torch.tensor([found[name] for name in names], dtype=torch.float64)
    tensors["counters"] = values.nan_to_num(nan=-1.0)  # nothing evaluated yet
    return tensors


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def without_times(path):
    """metrics.jsonl but for what a clock or the machine's memory decides."""
    clocks = ("tokens_per_s", "memory_bytes", "train_seconds")
    lines = bit.MetricsLog.read(Path(path) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


class Payload:
    """Pickled: opens a file for writing where it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
