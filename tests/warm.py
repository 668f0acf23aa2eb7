"""Python processes forked from one in which torch is imported already, which takes three seconds.

`run` and `start` are subprocess.run and Popen for a command that begins with sys.executable, or
with the Python of another environment in `PYTHONS`; each has its own process to fork from.
Nothing of this project is imported before the fork. Where there is no fork, or a variable is
another that Python or torch reads when it starts, the process is really a new one.
"""

import atexit
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from multiprocessing import forkserver, reduction, spawn
from pathlib import Path
from unittest import mock

LIBRARIES = ["torch._dynamo", "torch.distributed", "safetensors.torch", "tokenizers", "tqdm"]
LIBRARIES += ["jsonschema"]  # which takes nbformat a second and a half
PYTHONS = {sys.executable, os.environ.get("BITLLM_COLAB_PYTHON")}
EARLY = ("PYTHON", "OMP_", "MKL_", "KMP_", "TORCH_", "TORCHDYNAMO", "PYTORCH", "LD_", "LC_", "LANG")

MAIN = multiprocessing.current_process()
"""Read in a forked process before it becomes another"""


def early(environment):
    """Those variables that Python or a library reads when it starts."""
    found = environment.items()
    return {k: v for k, v in found if k.startswith(EARLY) and k != "PYTHONPATH"}


@lru_cache
def _server(python):
    """What forks processes of a Python, the paths it has by itself, and what its environment is."""
    server, code = forkserver.ForkServer(), "import json, sys; print(json.dumps(sys.path[1:]))"
    own = PATHS
    if python != sys.executable:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        own = json.loads(done.stdout)
    server.set_forkserver_preload(LIBRARIES)
    before, paths = spawn.get_executable(), sys.path[:]
    try:
        spawn.set_executable(python)
        sys.path[:] = own  # those that it preloads from
        server.ensure_running()
    finally:
        spawn.set_executable(before)
        sys.path[:] = paths
    return server, own, early(os.environ)


def _can_fork(command, env):
    here = sys.platform == "linux" and command[0] in PYTHONS  # without flags such as -I
    options = str(command[1]).startswith("-") and command[1] not in ("-c", "-m")
    return here and not options and early(env or os.environ) == _server(str(command[0]))[2]


class _Pipe(int):
    """A file descriptor, of which the child gets a copy."""

    def __reduce__(self):
        return _received, (reduction.DupFd(int(self)),)


def _received(copy):
    return copy.detach()


# Python's own: those of a new process, before a test or a library adds its
PATHS = [p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix))]


class Process:
    """What tests use of subprocess.Popen. Output that is asked for goes through files."""

    def __init__(self, command, *, cwd=None, env=None, stdout=None, stderr=None, **text):
        self.args = [str(word) for word in command]
        server, paths, _ = _server(self.args[0])
        self.text, self.files = text, {}
        given = text.pop("input", None)
        with contextlib.ExitStack() as stack:
            stdin = stack.enter_context(tempfile.TemporaryFile())
            stdin.write(given.encode() if isinstance(given, str) else given or b"")
            stdin.seek(0)
            pipes = [stdin.fileno()]
            for number, target in ((1, stdout), (2, stderr)):
                if target == subprocess.PIPE:
                    self.files[number] = target = tempfile.TemporaryFile()
                elif target == subprocess.DEVNULL:
                    target = stack.enter_context(Path(os.devnull).open("wb"))
                elif target == subprocess.STDOUT:
                    target = pipes[1]
                elif target is None:
                    target = number
                pipes.append(target if isinstance(target, int) else target.fileno())
            place, variables = str(Path(cwd or ".").resolve()), dict(env or os.environ)
            pipes = [_Pipe(pipe) for pipe in pipes]
            child = multiprocessing.get_context("forkserver").Process(
                target=_become, args=(self.args[1:], paths, place, variables, pipes)
            )
            with mock.patch.object(
                forkserver, "connect_to_new_process", server.connect_to_new_process
            ):
                child.start()
        self.child, self.pid = child, child.pid

    returncode = property(lambda self: self.child.exitcode)

    def poll(self):
        return self.child.exitcode

    def wait(self, timeout=None):
        self.child.join(timeout)
        if self.child.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.child.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self._output(1), self._output(2)

    def _output(self, number):
        if number not in self.files:
            return None
        with self.files.pop(number) as file:
            file.seek(0)
            data = file.read()
        if not self.text.get("text"):
            return data
        return data.decode(self.text.get("encoding") or "utf-8").replace("\r\n", "\n")


def start(command, **options):
    kind = Process if _can_fork(command, options.get("env")) else subprocess.Popen
    return kind(command, **options)


def run(command, *, capture_output=False, timeout=None, check=False, **options):
    if not _can_fork(command, options.get("env")):
        options |= {"capture_output": capture_output, "timeout": timeout, "check": check}
        return subprocess.run(command, **options)
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Process(command, **options)
    try:
        done = subprocess.CompletedProcess(
            process.args, process.wait(timeout), *process.communicate()
        )
    finally:
        process.kill()
    if check:
        done.check_returncode()
    return done


# In the child


def _become(command, paths, cwd, environment, pipes):
    """Be `python command ...` to the end."""
    PATHS[:] = paths
    for target, pipe in enumerate(pipes):
        os.dup2(pipe, target)
        os.close(pipe)
    # new ones: they ask once whether what they write to is a file
    sys.stdin = sys.__stdin__ = _stream(0, "rb", sys.stdout)
    sys.stdout = sys.__stdout__ = _stream(1, "wb", sys.stdout)
    sys.stderr = sys.__stderr__ = _stream(2, "wb", sys.stderr)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.process._current_process, MAIN.name = MAIN, "MainProcess"
    multiprocessing.process._parent_process = None
    if "torch" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does that by itself
        sys.modules["torch"].default_generator.seed()
    status = _status_of(command, paths)
    threading._shutdown()
    with contextlib.suppress(BaseException):  # it has told of it
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 120
    os._exit(status)


def _stream(number, mode, like):
    raw = mode == "wb" and like.write_through  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        open(number, mode, 0 if raw else -1, closefd=False),
        like.encoding,
        like.errors,
        line_buffering=like.line_buffering if number == 2 else os.isatty(number),
        write_through=like.write_through,
    )


def _status_of(command, paths):
    """Run the program; its exit status."""
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    kind, *rest = command
    folder = Path.cwd() if kind == "-m" else Path(kind).resolve().parent
    sys.path[:] = ["" if kind == "-c" else str(folder), *given, *paths]
    sys.argv = [kind, *rest[1:]] if kind in ("-c", "-m") else command
    try:
        if kind == "-c":
            main = sys.modules["__main__"] = type(sys)("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ending:
        if ending.code is not None and not isinstance(ending.code, int):
            print(ending.code, file=sys.stderr)
            return 1
        return (ending.code or 0) & 0xFF
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


class Fork:
    """A child of this forked process: a fork of it as it is now, which becomes a program later."""

    def __init__(self):
        self.socket, there = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            self.socket.close()
            text, pipes, _, _ = socket.recv_fds(there, 1 << 20, 3)
            if not text:  # it was not needed
                os._exit(0)
            there.close()
            command, cwd, environment = json.loads(text)
            _become(command, PATHS, cwd, environment, pipes)
        there.close()

    def become(self, command, cwd, environment):
        """Be `python command ...` from here on; its streams are those of this process."""
        text = json.dumps([command, str(Path(cwd or ".").resolve()), environment])
        with self.socket, Path(os.devnull).open("rb") as stdin:
            socket.send_fds(self.socket, [text.encode()], [stdin.fileno(), 1, 2])
        process = object.__new__(subprocess.Popen)
        process.__dict__ |= {"args": command, "pid": self.pid, "returncode": None}
        process.__dict__ |= {"stdin": None, "stdout": None, "stderr": None}
        process.__dict__ |= {"_child_created": True, "_waitpid_lock": threading.Lock()}
        process.__dict__ |= {
            "_communication_started": False,
            "_input": None,
            "_sigint_wait_secs": 0,
        }
        return process
