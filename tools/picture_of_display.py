"""Take docs/live_display.png and live_display_es.png from outputs committed in both notebooks 01.

python tools/picture_of_display.py        # needs chromium
"""

from pathlib import Path

import nbformat
from page_in_browsers import Chromium

ROOT = Path(__file__).resolve().parents[1]


PICTURES = {"live_display": ("01_train", "by step"), "live_display_es": ("01_entrenar", "por paso")}


def card(notebook: str, words: str) -> str:
    """The last drawing of the live display, HTML: its chart is described with these words."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = [x["data"]["text/html"] for x in outputs if "text/html" in x.get("data", {})]
    return next(page for page in reversed(pages) if words in page)


if __name__ == "__main__":
    browser = Chromium()
    page = browser.new_page(viewport={"width": 932, "height": 900})
    for picture, shown in PICTURES.items():
        style = "font: 14px sans-serif; background: white"
        page.set_content(f'<body style="{style}">{card(*shown)}</body>')
        page.locator("body > div").screenshot(path=ROOT / "docs" / f"{picture}.png")
    browser.close()
