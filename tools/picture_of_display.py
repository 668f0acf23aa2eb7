"""Take docs/live_display.png from the outputs committed in notebooks/01_train.ipynb.

python tools/picture_of_display.py        # needs chromium
"""

from pathlib import Path

import nbformat
from page_in_browsers import Chromium

ROOT = Path(__file__).resolve().parents[1]


def card() -> str:
    """The last drawing of the live display, HTML."""
    cells = nbformat.read(ROOT / "notebooks" / "01_train.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = [x["data"]["text/html"] for x in outputs if "text/html" in x.get("data", {})]
    return next(page for page in reversed(pages) if "loss by step" in page)


if __name__ == "__main__":
    browser = Chromium()
    page = browser.new_page(viewport={"width": 932, "height": 900})
    page.set_content(f'<body style="font: 14px sans-serif; background: white">{card()}</body>')
    page.locator("body > div").screenshot(path=ROOT / "docs" / "live_display.png")
    browser.close()
