"""Point the badges, and the repository that a set-up cell falls back to, at a repository.

python tools/set_repository.py --repo OWNER/NAME [--branch main]
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDER = "OWNER/bitllm"
NAME, BRANCH = r"[\w.-]+/[\w.-]+", r"[\w./-]+?"
PLACES = (
    re.compile(
        rf"(?<=colab\.research\.google\.com/github/)({NAME})(/blob/)({BRANCH})(?=/notebooks/)"
    ),
    re.compile(rf"(?<=welcome\?src=https://github\.com/)({NAME})(/blob/)({BRANCH})(?=/notebooks/)"),
    re.compile(
        rf"(?<=\]\(https://github\.com/)({NAME})(/blob/)({BRANCH})(?=/(?:docs|notebooks|README))"
    ),
    re.compile(rf'(?<=HOME = "https://github\.com/)({NAME})(/tree/)({BRANCH})(?=")'),
    re.compile(rf'(?<=else )\\?"({NAME})(@)({BRANCH})(?=\\?"\))'),
)
CLONE = re.compile(rf"(?<=git clone https://github\.com/){NAME}")
PAGES = re.compile(r"https://[\w-]+\.github\.io/[\w.-]+/(?=\))")


def files(root: Path = ROOT) -> list[Path]:
    """Every file that names the repository."""
    names = [root / name for name in ("README.md", "README.es.md", "colab_badge.md")]
    names.append(root / "bitllm" / "export" / "webpage.py")
    sources = sorted((root / "notebooks").glob("*.py"))
    return names + [p.with_suffix(suffix) for p in sources for suffix in (".ipynb", ".py")]


def named(text: str) -> list[tuple[str, str]]:
    """Repository and branch of each place in a text."""
    return [(match[1], match[3]) for place in PLACES for match in place.finditer(text)]


def renamed(text: str, repository: str, branch: str) -> str:
    """The text with every place pointing to another repository."""
    for place in PLACES:
        text = place.sub(
            lambda m: m[0].replace(f"{m[1]}{m[2]}{m[3]}", f"{repository}{m[2]}{branch}"), text
        )
    owner, name = repository.split("/")
    return PAGES.sub(f"https://{owner}.github.io/{name}/", CLONE.sub(repository, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME")
    parser.add_argument("--branch", default="main")
    flags = parser.parse_args()
    if not re.fullmatch(NAME, flags.repo) or not re.fullmatch(r"[\w./-]+", flags.branch):
        parser.error(
            f"--repo {flags.repo} --branch {flags.branch}: expected OWNER/NAME and a branch"
        )
    for path in files():
        old = path.read_text(encoding="utf-8")
        new = renamed(old, flags.repo, flags.branch)
        path.write_text(new, encoding="utf-8", newline="\n")
        print(f"{path.relative_to(ROOT)}: {len(named(new))} places")


if __name__ == "__main__":
    main()
