"""The walls of the house: what may use what, and how long anything may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitllm_core as bit

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "bitllm_core.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
DEFS = {n.name: n for n in TREE.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
BANNERS = [
    (SOURCE[: m.start()].count("\n") + 1, m[1])
    for m in re.finditer(r"^# -{60,}\n# (\d+ .+)$", SOURCE, re.MULTILINE)
]
PACKAGE = sorted((ROOT / "bitllm").rglob("*.py"))
FILES = [ROOT / "bitllm_core.py", *PACKAGE]
FILES += [path for name in ("tests", "tools", "notebooks") for path in (ROOT / name).rglob("*.py")]


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
        "assert not heavy, heavy;"
        "assert 'bitllm' not in new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Budgets


def over_budget(path: Path):
    """Each part of a file that is too long, with its size and budget."""
    text = path.read_text(encoding="utf-8")
    name, lines = path.relative_to(ROOT), len(text.splitlines())
    budget = 2800 if path.name == "bitllm_core.py" else 500
    if lines > budget:
        yield f"{name} has {lines} lines, its budget is {budget}: split by subject or delete"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            budget = 200 if isinstance(node, ast.ClassDef) else 60
            if size > budget:
                where = f"{name}:{node.lineno} {node.name}"
                yield f"{where} has {size} lines, its budget is {budget}: split or delete"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path):
    assert not list(over_budget(path))


# The core and the package


def imports_of(tree: ast.AST):
    """Every module that a file imports, wherever in it; `from a import b` may mean a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports: write the module's full name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_core_reaches_the_package_through_one_function():
    assert not [name for name in imports_of(TREE) if name.split(".")[0] == "bitllm"]
    doors = [
        getattr(outer, "name", "top level")
        for outer in TREE.body
        for x in ast.walk(outer)
        if isinstance(x, ast.Constant) and isinstance(x.value, str) and "bitllm." in x.value
        if x.value.startswith("bitllm.")
    ]
    assert set(doors) == {"extension"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> set[str]:
    """Modules of the package that are imported when this one is."""
    body = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    names = set(imports_of(ast.Module(body, [])))
    modules = {module_of(other) for other in PACKAGE}
    return names & modules - {"bitllm"}  # which is imported before any of its modules


def test_the_package_has_no_cycles_and_reads_like_a_list():
    graph = {module_of(path): top_level_imports(path) for path in PACKAGE}
    done: set[str] = set()
    while graph:
        free = [name for name, needed in graph.items() if needed <= done]
        assert free, f"these import one another: {graph}"
        done |= set(free)
        graph = {name: needed for name, needed in graph.items() if name not in done}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_uses_public_names_of_the_core(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    private = [
        x.attr
        for x in ast.walk(tree)
        if isinstance(x, ast.Attribute)
        and isinstance(x.value, ast.Name)
        and x.value.id in ("core", "bitllm_core")
        and x.attr.startswith("_")
        and not x.attr.startswith("__")
    ]
    private += [name for name in imports_of(tree) if name.startswith("bitllm_core._")]
    assert not private


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["ruff", "check", "--preview", "--select", "PLW1514", "bitllm", "bitllm_core.py"],
        ["pyright"],  # for this system and Python; the workflow has three and two of them
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_tools_find_nothing(command):
    command = [sys.executable, "-m", *command]
    if "pyright" in command:
        command += ["--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
