"""Other systems and other versions of Python, as far as one machine can tell."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import bitllm_core as bit
from tests.conftest import ROOT, assert_same_bits, state_of
from tools.colab_environment import PINS

FILES = [ROOT / "bitllm_core.py", *sorted((ROOT / "bitllm").rglob("*.py"))]
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


# Versions of Python


@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_is_read_by_every_version(version):
    """By its own interpreter, where there is one; else as far as this one knows its grammar."""
    for path in FILES:
        minor = int(version.split(".")[1])
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, minor))
    python = shutil.which(f"python{version}")
    works = python and subprocess.run([python, "--version"], capture_output=True, check=False)
    if works and not works.returncode:
        code = "import sys; [compile(open(p, 'rb').read(), p, 'exec') for p in sys.argv[1:]]"
        subprocess.run([python, "-c", code, *map(str, FILES)], check=True, timeout=60)


# Encodings

NAME = "m\u00e1s"
SEVERAL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bitllm.cli import main
sys.exit(sum(main(command) for command in json.loads(sys.argv[2])))
"""
"""Commands in one process: torch takes seconds to import."""


def test_names_and_texts_in_an_environment_without_unicode(run_cli, tmp_path):
    """LC_ALL=C, as in many containers, and a stdout of ASCII: the run is the same to the bit."""
    folder = tmp_path / "ni\u00f1o \u65e5\u672c"
    folder.mkdir()
    text = folder / "a\u00f1o.txt"
    lines = [f"{i} gatos y \u00f1and\u00fas \U0001f431\n" for i in range(400)]
    text.write_text("".join(lines), encoding="utf-8")
    flags = ["--preset", "ci", "--compile", "off", "--dtype", "float32", "--data", text]
    poor = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    poor = {k: v for k, v in os.environ.items() if k not in ("LANG", "PYTHONUTF8")} | poor
    done = run_cli("train", *flags, "--out", folder / "one", "--max-steps", 3)
    assert done.returncode == 0, done.stderr
    train, out = ["train", *flags, "--out", folder / NAME], folder / "\u00e9"
    export = ["export", "--model", folder / NAME, "--to", "hf", "--out", out]
    commands = [[*train, "--max-steps", 2], [*train, "--max-steps", 3], export]
    commands = json.dumps([[str(word) for word in command] for command in commands])
    several = [sys.executable, "-c", SEVERAL, ROOT, commands]
    done = subprocess.run(several, env=poor, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_bits(state_of(folder / "one"), state_of(folder / NAME))
    assert bit.read_json(out / "config.json")["bitllm"]["name"] == NAME
    prompt = "\u00f1and\u00fas"
    flags = ["--model", out, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 4]
    texts = [run_cli("generate", *flags, env=environment).stdout for environment in (None, poor)]
    assert texts[0].startswith(prompt)
    assert texts[1] == texts[0].encode("ascii", "replace").decode()


# The workflow of a fork


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def commands(job):
    return [step["run"].strip() for step in job["steps"] if "run" in step]


def test_the_workflow_runs_the_readmes_test_command(jobs):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(.+?)\n```", readme)[1]
    files = re.findall(r"-r \S+", command)
    tests = command.split(".venv/bin/")[-1]
    for job in jobs.values():
        *install, last = commands(job)
        assert last == tests
        assert all(file in "\n".join(install) for file in files)
        assert job["timeout-minutes"] <= 360  # after which the service ends it


def test_the_workflow_has_three_systems_and_both_ends_of_the_versions(jobs):
    matrix, job = jobs["test"]["strategy"]["matrix"], jobs["test"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == [VERSIONS[0], VERSIONS[-1]]
    named = {item["python"]: item["versions"] for item in matrix["include"]}
    assert named == {VERSIONS[0]: "lowest-direct", VERSIONS[-1]: "highest"}
    assert "--resolution ${{ matrix.versions }}" in "\n".join(commands(job))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={VERSIONS[0]}"' in project


def test_the_workflow_has_colabs_set(jobs):
    text = "\n".join(commands(jobs["colab"]))
    assert "torch==2.11" in text
    assert "datasets==4.0" in text
    assert "tools/colab_environment.py" in text
    assert {"ipykernel==6.17.1", "ipywidgets==7.7.1"} < {*PINS}


def test_the_workflow_keeps_the_pictures_of_each_job(jobs):
    for job in jobs.values():
        last = job["steps"][-1]
        assert last["uses"].startswith("actions/upload-artifact@")
        assert last["if"] == "always()"  # a failed test's picture above all
        assert last["with"]["path"] == "artefacts"
    assert "artefacts/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_a_linter_finds_nothing_in_the_workflows():
    linter = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    command = [*linter, "vendor.github-workflows", *WORKFLOW.parent.glob("*.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_a_name_that_windows_cannot_have():
    folders = ("bitllm", "docs", "notebooks", "tests", "tools", ".github", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    parts = {part for name in names for part in name.split("/")}
    device = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
    assert not [p for p in parts if device.fullmatch(p) or re.search(r'[<>:"\\|?*]|[ .]$', p)]
    lower = [name.lower() for name in names]
    assert len(lower) == len({*lower})
