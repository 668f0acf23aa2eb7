"""A forked process is to its tests as a new one."""

import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
LOOK = """
import json, multiprocessing, os, random, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ),
    "main": __name__, "streams": [s.encoding for s in (sys.stdin, sys.stdout, sys.stderr)],
    "errors": [s.errors for s in (sys.stdin, sys.stdout, sys.stderr)], "in": sys.stdin.read(),
    "lines": [s.line_buffering for s in (sys.stdout, sys.stderr)], "nice": os.nice(0),
    "handlers": [str(signal.getsignal(n)) for n in (2, 13, 15, 17)], "threads": len(os.listdir(
    "/proc/self/task")), "process": multiprocessing.current_process().name,
    "method": multiprocessing.get_start_method(), "group": os.getpgid(0),
    "bits": random.getstate()[2] is None, "umask": os.umask(0o22),
}, sort_keys=True))
"""


def both(command, **options):
    """What a new and a forked process answer."""
    options = {"capture_output": True, "text": True, **options}
    ways = (subprocess.run(command, **options), warm.run(command, **options))
    return [(done.returncode, done.stdout, done.stderr) for done in ways]


@pytest.mark.parametrize("kind", ["-c", "script", "-m"])
def test_it_sees_what_a_new_process_sees(tmp_path, monkeypatch, kind):
    (tmp_path / "look.py").write_text(LOOK)
    monkeypatch.setenv("OF_THIS_TEST", "1")
    command = {"-c": ["-c", LOOK], "script": ["look.py"], "-m": ["-m", "look"]}[kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "input": "Пять\n"}
    new, forked = both([sys.executable, *command, "a", "b"], **options)
    assert new[0] == 0, new[2]
    assert forked[0] == 0, forked[2]
    new_sees, forked_sees = json.loads(new[1]), json.loads(forked[1])
    if kind == "-m":
        assert new_sees["argv"].pop(0) == forked_sees["argv"].pop(0)
    assert forked_sees == new_sees
    assert forked[2] == new[2] == ""


@pytest.mark.parametrize(
    "code",
    [
        "print('ok')",
        "import sys; sys.exit()",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('in words')",
        "import sys; sys.exit(-1)",
        "import os; os._exit(5)",
        "import os; os.kill(os.getpid(), 15)",
        "import os; os.kill(os.getpid(), 2); import time; time.sleep(9)",
        "import atexit; atexit.register(print, 'at the end'); 1 / 0",
        "import threading; threading.Timer(0.1, print, ['a thread']).start()",
    ],
)
def test_it_ends_as_a_new_process_ends(code):
    new, forked = both([sys.executable, "-c", code])
    assert forked[:2] == new[:2]
    assert forked[2].splitlines()[-1:] == new[2].splitlines()[-1:]


def test_nothing_of_the_project_or_of_the_hub_is_there_before_its_program():
    code = "import sys; print([m for m in sys.modules if m.split('.')[0] in ("
    code += "'bitllm', 'bitllm_core', 'huggingface_hub', 'datasets', 'transformers', 'pytest')])"
    done = warm.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_no_two_have_the_same_random_numbers():
    code = "import random, numpy, torch; print(torch.rand(1).item());"
    code += "print(random.random()); print(numpy.random.rand())"
    command, options = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    numbers = [warm.run(command, **options).stdout.split() for _ in range(2)]
    assert len({*numbers[0], *numbers[1]}) == 6


def test_a_variable_that_torch_reads_first_needs_a_new_process():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    code = "import torch; print(torch.get_num_threads())"
    done = warm.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"2\n"


def test_it_is_killed_by_its_number_and_waited_for():
    process = warm.start([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL == process.returncode
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_another_environments_python_is_that_one(tmp_path, monkeypatch):
    """As the one with Colab's packages, whose paths and libraries are its own."""
    venv.create(tmp_path / "other", symlinks=True, system_site_packages=True)
    python = str(tmp_path / "other" / "bin" / "python")
    monkeypatch.setattr(warm, "PYTHONS", {python})
    monkeypatch.setattr(warm, "LIBRARIES", ["json.tool"])
    new, forked = both([python, "-c", "import sys; print(sys.executable, sys.prefix, sys.path)"])
    assert new[1].startswith(python)
    assert forked == new


FORK = """
import os, subprocess, sys
fork = sys.modules["tests.warm"].Fork()
print(fork.pid, flush=True)
if len(sys.argv) > 1:
    child = fork.become(["-c", "import sys; print(sys.argv); sys.exit(3)", "a"], None, {})
    print(child.poll() in (None, 3), child.wait(20), child.poll())
"""


def test_a_fork_becomes_a_program_or_ends_with_its_parent():
    done = warm.run([sys.executable, "-c", FORK, "use"], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["['-c', 'a']", "True 3 3"], done.stderr
    done = warm.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    ended = Path("/proc") / done.stdout.strip() / "stat"
    end = time.monotonic() + 20
    while ended.exists() and ended.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert time.monotonic() < end
