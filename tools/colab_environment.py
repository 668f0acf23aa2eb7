"""Make .venv-colab: Colab's ipykernel, ipywidgets and IPython over what another environment has.

    python tools/colab_environment.py [SITE_PACKAGES]  # default: .venv's, which may come later
    BITLLM_COLAB_PYTHON=.venv-colab/bin/python python -m pytest -q tests/notebook

Only the notebook's own packages differ; torch and the rest are the other environment's.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PINS = ("ipykernel==6.17.1", "ipywidgets==7.7.1", "ipython==7.34.0")


def make(folder: Path, below: Path) -> Path:
    """Returns the new environment's Python; `below` is an environment's site-packages."""
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    (site_packages(folder) / "below.pth").write_text(f"{below}\n", encoding="utf-8")
    command = [python, "-m", "pip", "install", "-q", *PINS]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return python


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)}))


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    below = sys.argv[1] if sys.argv[1:] else site_packages(root / ".venv")
    print(make(root / ".venv-colab", Path(below)))
