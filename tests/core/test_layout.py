"""The table of contents at the top of bitllm_core.py tells the truth, and the tools are content."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitllm_core as bit

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "bitllm_core.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
DEFS = {n.name: n for n in TREE.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
BANNERS = [
    (SOURCE[: m.start()].count("\n") + 1, m[1])
    for m in re.finditer(r"^# -{60,}\n# (\d+ .+)$", SOURCE, re.MULTILINE)
]


def section_of(line: int) -> int:
    return sum(start <= line for start, _ in BANNERS)


def uses(found):
    for name, node in DEFS.items():
        for x in ast.walk(node):
            if isinstance(x, ast.Name) and x.id in DEFS and found(node, DEFS[x.id], x.id):
                yield f"{name} (line {node.lineno}) uses {x.id} (line {DEFS[x.id].lineno})"


def test_contents_lists_the_sections_in_order():
    contents = ast.get_docstring(TREE, clean=False)
    listed = re.findall(r"^ +(\d+ [\w ]+?)  +", contents, re.MULTILINE)
    assert listed == [title for _, title in BANNERS]


def test_sections_use_only_the_sections_above():
    forward = uses(lambda node, used, _: section_of(used.lineno) > section_of(node.lineno))
    assert not list(forward)


def test_private_names_stay_in_their_section():
    leaks = uses(
        lambda node, used, name: (
            name.startswith("_") and section_of(used.lineno) != section_of(node.lineno)
        )
    )
    assert not list(leaks)


def test_every_public_name_is_there_and_explained():
    for name in bit.__all__:
        assert getattr(bit, name).__doc__, name


def test_importing_does_nothing_and_brings_no_heavy_library():
    code = (
        "import sys, torch; state = torch.get_rng_state(); before = set(sys.modules);"
        "import bitllm_core; new = set(sys.modules) - before;"
        "assert torch.equal(state, torch.get_rng_state());"
        "heavy = {'datasets', 'tokenizers', 'matplotlib', 'ipywidgets', 'tqdm', 'pandas'} & new;"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["pyright", "--pythonpath", sys.executable],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_tools_find_nothing(command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
