"""The machine that a notebook runs on, and the repository that the notebook came from."""

from __future__ import annotations

import contextlib
import html
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import torch

import bitllm.notebook.kernel as kernel
from bitllm.compiling import why_not_compile
from bitllm.notebook.language import retold, say
from bitllm_core import choose_device, require, versions


def environment_report(folder: str | Path = ".") -> str:
    """GPU, memory, disk, precision, versions and where the package came from, one line each."""
    device, disk = choose_device(), shutil.disk_usage(folder)
    gpu = say("none, so the CPU trains. In Colab: Runtime > Change runtime type > T4 GPU")
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {_free_of(*torch.cuda.mem_get_info())}"
    memory = say("unknown")
    with contextlib.suppress(ImportError):  # every notebook kernel brings it
        import psutil

        memory = _free_of(psutil.virtual_memory().available, psutil.virtual_memory().total)
    installed = versions()
    for name in ("tokenizers", "datasets", "ipykernel", "ipywidgets", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    report = {
        "GPU": gpu,
        say("memory"): say("{memory}, {count} cores", memory=memory, count=os.cpu_count()),
        say("disk"): _free_of(disk.free, disk.total),
        say("precision"): retold(str(device)),
        "torch.compile": retold(why_not_compile(device.device)) or say("available"),
        say("versions"): ", ".join(f"{name} {version}" for name, version in installed.items()),
    }
    if archive := _installed_from():
        report[say("package")] = archive + _other_origin(archive)
    return "\n".join(f"{name + ':':15}{value}" for name, value in report.items())


def show_environment(folder: str | Path = ".") -> None:
    """What trains here in a line, and the whole report folded; without a notebook, the report."""
    report = environment_report(folder)
    if not kernel.in_notebook():
        print(report)
        return
    from IPython.display import display

    first, text = html.escape(report.partition("\n")[0]), html.escape(report)
    summary = f'<summary style="cursor:pointer">{first}</summary>'
    fold = f'<details>{summary}<pre style="background:none">{text}</pre></details>'
    display({"text/html": fold, "text/plain": report}, raw=True)


def _free_of(free: int, total: int) -> str:
    return say("{free:.1f} of {total:.1f} GiB free", free=free / 2**30, total=total / 2**30)


def repository() -> str | None:
    """The repository that this notebook was opened from, as OWNER/NAME@BRANCH; None if unknown.

    The set-up cell of the notebooks tries the first two ways to find the package; a copy in Drive
    can be traced with the package alone. Google documents neither of its two, so each of them gets
    two seconds and may fail.
    """
    if given := os.environ.get("BITLLM_REPOSITORY"):
        return given
    for ask in (_session, _provenance):
        with contextlib.suppress(Exception):
            if match := re.search(r"github\.com/([^\"]+?)/blob/([^\"]+?)/notebooks/", ask()):
                return f"{match[1]}@{match[2]}"
    return None


def _session() -> str:
    """Colab's list of sessions; it has the address of a notebook that came from GitHub."""
    address = "http://{COLAB_JUPYTER_IP}:{KMP_TARGET_PORT}/api/sessions".format(**os.environ)
    with urllib.request.urlopen(address, timeout=2) as answer:
        return urllib.parse.unquote(answer.read().decode())


def _provenance() -> str:
    """The files that a copy in Drive descends from, one per line."""
    from google.colab import _message  # type: ignore[import-not-found]

    book = _message.blocking_request("get_ipynb", timeout_sec=2)["ipynb"]
    return "\n".join(item["file_id"] for item in book["metadata"]["colab"]["provenance"])


def _installed_from() -> str:
    """The archive that pip installed the package from; empty in a checkout."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        told = importlib.metadata.distribution("bitllm").read_text("direct_url.json")
        return json.loads(told)["url"] if told else ""
    return ""


def _other_origin(archive: str) -> str:
    """A note for a copy in Drive of a fork's notebook: the set-up cell cannot see the fork."""
    origin = repository() if "google.colab" in sys.modules else None
    path = f"{origin}".replace("@", "/archive/") + ".zip"
    if not origin or archive.endswith(f"/{path}"):
        return ""
    return say(
        "\nThis notebook is a copy of one in {origin}. For the package of that repository, run\n"
        "{command}\nand restart the session.",
        origin=origin,
        command=f"%pip install -q --no-deps --force-reinstall https://github.com/{path}",
    )


def check_gpu(
    out: str | Path = "found", data: str = "wikitext-2", minutes: float = 10.0, stages: str = ""
) -> Path:
    """Find out whether everything works on this GPU, and how fast, by tools/gpu_check.py.

    The tool is the checkout's, or that of the archive which the package was installed from.

    Args:
        data: a text or a data set that the stages train on, of 10 MB or more.
        stages: only these, by comma; default: all.

    Returns the file that docs/gpu.md asks for. ValueError: there is no GPU, or the tool is neither
    here nor there. OSError: there is no such text.
    """
    expected = "one that CUDA knows. In Colab: Runtime > Change runtime type > T4 GPU"
    require(torch.cuda.is_available(), "GPU", None, expected)
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory() as folder:
        tool = _tools(Path(folder)) / "gpu_check.py"
        prepared = Path(folder, "tokens")
        flags = ["--stages", stages] * bool(stages)
        if _show_command(tool, "prepare", prepared, "--data", data):
            raise OSError(f"no tokens of {data!r} could be prepared; the reason is above")
        _show_command(tool, "run", prepared, "--out", out, "--minutes", minutes, *flags)
        _show_command(tool, "report", out)
    return out / "results.jsonl"


def _tools(folder: Path) -> Path:
    """The folder `tools` of a checkout, or of the package's archive, unpacked in `folder`."""
    beside = Path(__file__).parents[2] / "tools"
    if beside.is_dir():
        return beside
    archive, expected = _installed_from(), "that of a checkout, or installed from its archive"
    require(archive.endswith(".zip"), "package", archive or "bitllm", expected)
    path, _ = urllib.request.urlretrieve(archive, folder / "archive.zip")
    shutil.unpack_archive(path, folder)
    return next(folder.glob("*/tools"))


def _show_command(*command: object) -> int:
    """Run a Python program, print what it prints where the notebook shows it; its exit status."""
    arguments = [sys.executable, "-u", *map(str, command)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout or ():
            print(line, end="")
    return child.returncode
