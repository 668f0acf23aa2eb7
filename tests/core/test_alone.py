"""bitllm_core.py copied alone into an empty folder does the main job on a local text."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BLOCKED = ("bitllm", "datasets", "pyarrow")

TRAIN = """
model = bit.ModelConfig(300, 32, 64, 1, 2, 1, 16)
data = bit.DataConfig(data="text.txt")
train = bit.TrainConfig(max_steps=4, batch_tokens=128, warmup_steps=1, eval_tokens=256)
tokens, tokenizer = bit.prepare_data(data, model.vocab_size, 16, "run")
assert len(tokens.training) > 1000 and len(tokens.validation) > 50
state = bit.train(model, data, train, "run", callbacks=())
assert state.step == 4
net, tokenizer = bit.load_model("run")
sampling = bit.SamplingConfig(max_new_tokens=5, seed=0)
assert bit.generate(net, tokenizer, "cats", sampling) == "".join(
    bit.stream(net, tokenizer, "cats", sampling)
)
assert bit.evaluate(net, tokenizer, "text.txt")["loss"] > 0
"""

HUB = """
try:
    bit.prepare_data(bit.DataConfig(data="tinystories"), 300, 16, "run")
except ImportError as error:
    print(error)
"""

BUDGET = """
try:
    bit.prepare_data(bit.DataConfig(data=".", max_train_tokens=1000), 300, 16, "run")
except ImportError as error:
    print(error)
"""


@pytest.fixture
def run_alone(tmp_path, tiny_corpus):
    shutil.copy(ROOT / "bitllm_core.py", tmp_path)
    shutil.copy(tiny_corpus, tmp_path / "text.txt")

    def run(code):
        block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"
        load = f"sys.path.insert(0, {str(tmp_path)!r}); import bitllm_core as bit\n"
        result = subprocess.run(
            [sys.executable, "-I", "-c", block + load + code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_it_prepares_trains_generates_and_evaluates(run_alone):
    run_alone(TRAIN)


def test_what_needs_more_says_what_to_install(run_alone):
    assert "needs the package datasets: pip install datasets" in run_alone(HUB)
    assert "needs the bitllm package" in run_alone(BUDGET)
