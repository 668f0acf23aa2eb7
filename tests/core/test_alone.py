"""bitllm_core.py copied alone into an empty folder does the main job on a local text."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests import warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times

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

ROWS = """
rows = [{"id": 1, "text": "one"}, {"id": 2, "text": None}]
assert list(bit.row_texts(iter(rows), None, "a set")) == ["one", ""]
assert list(bit.row_texts(iter([{"story": "two"}]), "story", "a set")) == ["two"]
try:
    list(bit.row_texts(iter([{"story": "two"}]), None, "a set"))
except ValueError as error:
    print(error)
"""

BUDGET = """
for data in (".", "pydocs:0.7,text.txt:0.3"):
    try:
        bit.prepare_data(bit.DataConfig(data=data, max_train_tokens=1000), 300, 16, "run")
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
        command = [sys.executable, "-c", block + load + code]
        environment = {"PATH": os.environ["PATH"], **warm.early(os.environ)}
        options = {"capture_output": True, "text": True, "check": False}
        result = warm.run(command, cwd=tmp_path, env=environment, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_it_prepares_trains_generates_and_evaluates(run_alone):
    run_alone(TRAIN)


CELL = """
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
words = ["bitllm_core.py", "train", "--preset", "ci", "--data", "text.txt", "--max-steps", "1"]
words += ["--vocab-size", "300", "--out", "cell"]
lines = f"import sys, warnings\\nsys.argv = {words}\\n__name__ = '__main__'\\n"
sys.modules.pop("bitllm_core")
cell = InteractiveShell.instance().run_cell(lines + Path("bitllm_core.py").read_text("utf-8"))
assert cell.error_in_exec.code == 0, cell.error_in_exec
"""


def test_it_runs_as_a_cell_as_colab_run_sends_it(run_alone):
    """The file after other statements, its arguments set before."""
    assert "complete: 1 steps" in run_alone(CELL)


def test_what_needs_more_says_what_to_install(run_alone):
    assert "needs the package datasets: pip install datasets" in run_alone(HUB)
    stream, mixture = run_alone(BUDGET).splitlines()
    assert "needs the bitllm package" in stream
    assert "a mixture of sources needs the bitllm package" in mixture


def test_of_a_hubs_rows_it_reads_the_column_text_or_the_one_asked_for(run_alone):
    assert "expected a column of text; a set has story" in run_alone(ROWS)


FLAGS = """--data text.txt --vocab-size 300 --hidden-size 32 --intermediate-size 64
--num-hidden-layers 1 --num-attention-heads 2 --max-position-embeddings 16 --batch-tokens 128
--max-steps 60 --warmup-steps 2 --eval-every-steps 20 --eval-tokens 256 --save-every-steps 10"""


@pytest.fixture
def command(tmp_path, tiny_corpus):
    """A command of the file alone; a `new` process has nothing in its environment but PATH."""
    shutil.copy(ROOT / "bitllm_core.py", tmp_path)
    shutil.copy(tiny_corpus, tmp_path / "text.txt")

    def start(*arguments, new=False):
        command = [sys.executable, "bitllm_core.py", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = {"OMP_NUM_THREADS": "1"} if new else warm.early(os.environ)
        options |= {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"], **own}}
        return (subprocess.Popen if new else warm.start)(command, encoding="utf-8", **options)

    return start


def output_of(process, status=0):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return out if status == 0 else errors


def test_its_command_line_resumes_a_killed_run_to_the_same_bits(command, tmp_path):
    train = ["train", *FLAGS.split(), "--out"]
    assert "complete: 60 steps" in output_of(command(*train, "whole", new=True))
    killed = command(*train, "run")
    saved = tmp_path / "run" / "checkpoints" / "step_00000020.json"
    while not saved.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not list(saved.parent.glob("step_00000060.json"))
    assert "complete: 60 steps" in output_of(command("train", "--out", "run"))  # its own settings
    assert_same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    texts = [
        output_of(command("generate", "--model", run, "--prompt", "9 cats", "--seed", "0"))
        for run in ("run", "whole")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("9 cats")
    found = json.loads(output_of(command("evaluate", "--model", "run", "--data", "text.txt")))
    assert 0 < found["loss"] < 5.6  # of a uniform guess: 5.70


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "--model", "x"], "export, plan, info, bench need the bitllm package"),
        (["train", "--preset", "huge", "--out", "x"], "invalid choice: 'huge'"),
        (["train", "--out", "x", "--max-steps", "many"], "invalid int value: 'many'"),
        (["train", "--out", "x", "--mirror", "y"], "--mirror needs the bitllm package"),
        (["generate", "--model", "nowhere"], "not a run folder"),
        (
            ["train", "--preset", "ci", "--out", "export"],
            "config.json of='export': expected a run's",
        ),
    ],
)
def test_its_command_line_says_what_is_wrong(command, arguments, says, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"model_type": "bitnet"}')
    status = 1 if "--mirror" in arguments else 2
    errors = output_of(command(*arguments), status)
    assert says in errors
    assert len(errors.strip().splitlines()) <= 2
