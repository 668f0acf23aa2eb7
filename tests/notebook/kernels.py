"""A notebook kernel of this or another environment, spoken to as a front end does."""

import contextlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests import warm
from tests.conftest import ROOT

KERNELS = {"newest": sys.executable, "colab": os.environ.get("BITLLM_COLAB_PYTHON")}
"""Name -> Python. Colab's pair of ipykernel and ipywidgets is made by tools/colab_environment.py"""


def python_of(name):
    python = KERNELS[name]
    if not python:
        pytest.skip("BITLLM_COLAB_PYTHON is not set; tools/colab_environment.py tells how")
    return python


def put_package(folder):
    """The core and the package, beside a notebook in `folder`."""
    shutil.copy(ROOT / "bitllm_core.py", folder)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bitllm", folder / "bitllm", ignore=without_caches)


def shorten_companion(folder):
    """Few conversations for the package in `folder`: seconds instead of a minute."""
    path = folder / "bitllm" / "companion.py"
    text = path.read_text(encoding="utf-8")
    assert '"train": 20_000' in text
    path.write_text(text.replace('"train": 20_000', '"train": 2_000'), encoding="utf-8")


@contextlib.contextmanager
def kernel(python, folder):
    """A client connected to a new kernel in `folder`."""
    with tempfile.TemporaryDirectory() as short:
        sockets = {}  # a port that was free a moment ago may be taken by another kernel
        if sys.platform != "win32":
            sockets = {"transport": "ipc", "ip": str(Path(short, "k"))}
        path, _ = write_connection_file(str(folder / "kernel.json"), **sockets)
        command = [python, "-m", "ipykernel_launcher", "-f", path]
        process = warm.start(command, cwd=folder, stderr=subprocess.DEVNULL)
        client = BlockingKernelClient()
        client.load_connection_file(path)
        client.start_channels(hb=False)  # under load a late heartbeat would pass for a death
        try:
            client.wait_for_ready(timeout=60)
            yield client
        finally:
            client.stop_channels()
            process.kill()
            process.wait(20)


class Cell:
    """One execution, and what the kernel has said since."""

    def __init__(self, client, code):
        self.client, self.text, self.comms, self.displays = client, "", {}, []
        self.states = []
        self.id, self.replied, self.done = client.execute(code), False, False

    def listen_until(self, found, timeout=90):
        """Read messages until `found(self)`, or fail with what was printed."""
        end = time.monotonic() + timeout
        while not found(self):
            assert time.monotonic() < end, f"nothing came within {timeout} s; so far: {self.text}"
            try:
                self.hear(self.client.get_iopub_msg(timeout=0.5))
            except queue.Empty:
                self.done = self.replied
                # not by "idle": ipykernel 6 says that too early where clicks come between steps
                with contextlib.suppress(queue.Empty):
                    reply = self.client.get_shell_msg(timeout=0.1)
                    self.replied |= reply["parent_header"].get("msg_id") == self.id
        return self

    def hear(self, message):
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self.text += content["text"]
        elif kind == "error":
            self.text += "\n".join(content["traceback"])
        elif kind == "comm_open":
            state = content["data"].get("state", {})
            self.comms[state.get("description") or state.get("placeholder")] = content["comm_id"]
        elif kind == "comm_msg":
            self.states.append(content["data"].get("state", {}))
        elif kind in ("display_data", "update_display_data"):
            self.displays.append(content["data"])

    def fill(self, description, text):
        data = {"method": "update", "state": {"value": text}, "buffer_paths": []}
        content = {"comm_id": self.comms[description], "data": data}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def click(self, description, subshell=None):
        data = {"method": "custom", "content": {"event": "click"}}
        content = {"comm_id": self.comms[description], "data": data}
        message = self.client.session.msg("comm_msg", content)
        if subshell:
            message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)


def new_subshell(client):
    """What JupyterLab sends widget messages through, where the kernel has it; else None."""
    client.kernel_info()
    reply = client.get_shell_msg(timeout=30)
    while reply["msg_type"] != "kernel_info_reply":
        reply = client.get_shell_msg(timeout=30)
    if "kernel subshells" not in reply["content"].get("supported_features", []):
        return None
    client.control_channel.send(client.session.msg("create_subshell_request"))
    return client.get_control_msg(timeout=30)["content"]["subshell_id"]


TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import bitllm as bit
bit.log_to(sys.stdout)
import dataclasses, signal, torch
torch.set_num_threads(1)
model, data, train = bit.PRESETS["ci"]
class After(bit.Callback):
    def on_step(self, state, metrics):
        state.stop_signal = signal.SIGINT if state.step == stop else 0
    def on_start(self, state):
        if stop == 30:
            display.on_mirror(state, "mirror: <failing> since 14:02")
def go(until, **changes):
    global stop, display
    stop, display = until, bit.LiveDisplay("run")
    changed = dataclasses.replace(train, **changes)
    return bit.train(model, data, changed, "run", callbacks=[display, After()])
"""
