"""What README, CONTRIBUTING and docs/ say is true of the code: commands, links, names, figures."""

import re
import shlex
from pathlib import Path

import pytest

import bitllm
import bitllm_core as bit
from bitllm.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
CURRENT = [name for name in TEXTS if name != "CHANGELOG.md"]
"""The changelog also names what is gone."""


def code_of(text: str) -> list[str]:
    """The lines of all blocks of commands, continued ones joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def prose_of(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", prose_of(text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def test_readme_has_both_commands_and_ci_runs_the_second():
    for name in ("main", "test"):
        pattern = rf"<!-- {name} command -->\n```bash\n(.+?)\n```"
        command = re.search(pattern, TEXTS["README.md"], re.DOTALL)
        assert command
        assert "\n" not in command[1]
        assert "requirements.txt" in command[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CURRENT)
def test_the_commands_shown_are_valid(name):
    shown = 0
    for line in code_of(TEXTS[name]):
        for command in line.split(" && "):
            match = re.search(r"(?:^bitllm|bitllm_core\.py) +(.+)$", command)
            if match and not line.lstrip().startswith("#"):
                words = shlex.split(match[1], comments=True)
                parser().parse_args([word for word in words if word != "..."])
                shown += 1
    expected = {"README.md": 8, "README.es.md": 8, "docs/usage.md": 12, "docs/export.md": 5}
    assert shown >= expected.get(name, 0)


@pytest.mark.parametrize("name", CURRENT)
def test_the_tools_shown_exist_and_have_the_flags(name):
    for line in code_of(TEXTS[name]):
        match = re.search(r"python (tools/\w+\.py)([^#]*)", line)
        if match:
            source = (ROOT / match[1]).read_text(encoding="utf-8")
            for flag in re.findall(r" (--[\w-]+)", match[2]):
                assert f'"{flag}"' in source, (match[1], flag)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    prose = prose_of(TEXTS[name])
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    for link in links:
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", CURRENT)
def test_the_files_named_exist(name):
    for path in re.findall(
        r"`((?:bitllm|docs|notebooks|tests|tools|\.github)/[\w./-]+)`", TEXTS[name]
    ):
        assert (ROOT / path).exists(), path


def test_the_table_of_presets_matches_the_code():
    for name, (model, data, train) in bit.PRESETS.items():
        lines = TEXTS["docs/usage.md"].splitlines()
        row = next(line for line in lines if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        size = float(cells[2].removesuffix("M"))
        assert abs(size - model.num_parameters / 1e6) <= 0.05, (name, model.num_parameters)
        assert cells[3] == data.data
        assert int(cells[4].replace(",", "")) == train.max_steps


def test_the_messages_in_troubleshooting_are_those_of_the_program():
    sources = [ROOT / "bitllm_core.py", *(ROOT / "bitllm").rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a string over several lines
    foreign = {"Cannot connect to GPU backend", "out of memory"}
    quoted = set(re.findall(r'"([^"\n]+)"', TEXTS["docs/troubleshooting.md"])) - foreign
    assert len(quoted) >= 8
    for message in quoted:
        for part in re.split(r" ?\.\.\. ?|[\d:,()]+", message):
            part = re.sub(r" (s|errors|Errno)$", "", part.strip())
            assert len(part) < 8 or part in source, (message, part)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_says_for_whom_it_is_and_is_in_the_index(path):
    paragraph = re.split(r"\n\n", path.read_text(encoding="utf-8"))[1]
    assert paragraph.startswith("For whoever "), paragraph
    assert path.name == "index.md" or f"({path.name})" in TEXTS["docs/index.md"]


def test_the_documents_keep_their_budgets():
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert lines["README.md"] <= 200
    assert lines["README.es.md"] <= 200
    docs = {name: count for name, count in lines.items() if name.startswith("docs/")}
    assert sum(docs.values()) <= 1500, f"{docs}: shorten or delete"


@pytest.mark.parametrize("name", ["README.md", "README.es.md"])
def test_a_readme_is_read_without_scrolling_to_the_right(name):
    for block in re.findall(r"^```.*?^```$", TEXTS[name], re.MULTILINE | re.DOTALL):
        for line in block.splitlines():  # GitHub shows 98 characters
            assert len(line) <= 98 or line.startswith("python3 -m venv "), line


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == bitllm.__version__
    newest = re.search(r"^## (\S+)", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert newest[1] == bitllm.__version__


def test_torch_is_bounded_above_the_last_version_tested():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch>=2\.9,<2\.14\.2$", lines, re.MULTILINE)
