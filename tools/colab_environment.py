"""Make .venv-colab: Colab's ipykernel, ipywidgets and IPython over what another environment has.

    python tools/colab_environment.py                  # over .venv, which may come later
    BITLLM_COLAB_PYTHON=.venv-colab/bin/python python -m pytest -q tests/test_notebooks.py

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
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site / "below.pth").write_text(f"{below}\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
    return python


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    inside = Path(sysconfig.get_path("purelib", "venv", {"base": str(root / ".venv")}))
    print(make(root / ".venv-colab", Path(sys.argv[1]) if sys.argv[1:] else inside))
