"""Downloads, and buttons that export a model; the web page is shown in a frame."""

from __future__ import annotations

import html
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bitllm.notebook.kernel as kernel
from bitllm.notebook.language import number, say
from bitllm_core import first_line

FORMATS = {  # button: ending, help
    "Web page": (".html", "one page with the model inside, for any browser, also on a phone"),
    "GGUF": (".gguf", "for llama.cpp, ollama and LM Studio"),
    "transformers": ("-hf", "a folder for Hugging Face transformers, as a .zip"),
    "Small file": (".safetensors", "the smallest, for this program"),
}


def download_button(path: str | Path) -> None:
    """Offer a file, or a folder as a zip: a button in Colab, a link in Jupyter, else its path."""
    path = _as_file(Path(path))
    widgets = kernel.widgets()
    if widgets is None:
        print(say("saved as {path}", path=path))
        return
    from IPython.display import display

    if (button := _colab_button(path)) is not None:
        display(button)
    else:
        display({"text/html": link(path), "text/plain": path.as_posix()}, raw=True)


def link(path: Path) -> str:
    """A link that downloads a file beside the notebook, with its size."""
    address, text = quote(path.as_posix()), say("Download {name}", name=html.escape(path.name))
    size = f" ({number(path.stat().st_size / 1e6, '.1f')} MB)" if path.exists() else ""
    return f'<a href="{address}" download>{text}</a>{size}'


def _as_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    shutil.make_archive(str(path), "zip", path)
    return path.with_name(path.name + ".zip")


def _colab_button(path: Path) -> Any:
    """Colab's way to download; None elsewhere."""
    try:
        from google.colab import files  # type: ignore[import-not-found]
    except ImportError:
        return None
    description = say("Download {name}", name=path.name)
    button = kernel.widgets().Button(description=description, layout={"width": "auto"})
    button.on_click(lambda _: files.download(str(path)))
    return button


def upload_box(folder: str | Path = "models") -> None:
    """A button that uploads a packed or GGUF model; nothing without widgets."""
    w = kernel.widgets()
    if w is None:
        return
    button = w.FileUpload(accept=".safetensors,.gguf", description=say("or upload a model"))
    button.layout.width, said = "220px", w.HTML()

    def keep(change: dict[str, Any]) -> None:
        for name, content in uploaded(change["new"]).items():
            path = Path(folder) / Path(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            text = say("{file}: now run everything again", file=path.as_posix())
            said.value = html.escape(text)

    button.observe(keep, "value")
    text = say("a button that uploads a model: run this cell to use it")
    kernel.show(w.HBox([button, said]), text)


def uploaded(value: Any) -> dict[str, bytes]:
    """Names and contents of a FileUpload's files; ipywidgets 7 has a dict, 8 a tuple."""
    if isinstance(value, dict):
        return {name: bytes(item["content"]) for name, item in value.items()}
    return {item["name"]: bytes(item["content"]) for item in value}


def export_box(run: str | Path, folder: str | Path = "exports") -> None:
    """Buttons that export a run and offer the file; without widgets, how to do it in code."""
    w, run = kernel.widgets(), Path(run)
    if w is None:
        print(f"bit.export_html({run.as_posix()!r}, 'model.html'), bit.export_gguf, bit.export_hf")
        return
    stop, out, rows = w.Button(), w.Output(), []
    for name, (_, tip) in FORMATS.items():
        button = w.Button(description=say(name), tooltip=say(tip))
        button.layout = w.Layout(width="130px", flex="0 0 auto")
        kernel.InThread(button, stop, lambda name=name: _export(name, run, Path(folder), out))
        rows.append(w.HBox([button, w.HTML(html.escape(say(tip)))]))
    text = say("buttons that export the model: run this cell to use them")
    kernel.show(w.VBox([*rows, out]), text)


def _export(name: str, run: Path, folder: Path, out: Any) -> Iterator[None]:
    """Write one export, say how to use it, and offer it."""
    _fill(out, f"<i>{html.escape(say('{name}: writing ...', name=say(name)))}</i>")
    yield
    try:
        path = write_export(name, run, folder)
    except Exception as error:  # a thread's traceback would reach nobody
        return _fill(out, html.escape(f"{say(name)}: {first_line(error)}"))
    file = _as_file(path)
    frame = _frame(path) if path.suffix == ".html" else ""
    if (button := _colab_button(file)) is None:
        return _fill(out, f"<div>{link(file)}</div>{frame}")
    _fill(out, frame)
    out.append_display_data(button)


def write_export(name: str, run: Path, folder: Path) -> Path:
    """Export a run in one of FORMATS to a folder; returns the path. Raises as `export_*` do."""
    import bitllm.export as export

    write = {
        "Web page": export.export_html,
        "GGUF": export.export_gguf,
        "transformers": export.export_hf,
        "Small file": export.export_packed,
    }[name]
    if name in ("Web page", "GGUF") and importlib.util.find_spec("gguf") is None:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "gguf"]
        subprocess.run(command, check=False)  # a clear error follows where it failed
    folder.mkdir(parents=True, exist_ok=True)
    return write(run, folder / f"{run.stem}{FORMATS[name][0]}", overwrite=True).path


def show_page(path: str | Path) -> None:
    """Show a web page beside the notebook, such as `export_html` writes, in a frame."""
    from IPython.display import display

    display({"text/html": _frame(Path(path)), "text/plain": str(path)}, raw=True)


def _frame(path: Path) -> str:
    """A page in a frame. JupyterLab finds the file; Colab serves none, so it shows the button."""
    style = "width:100%;max-width:900px;height:640px;border:1px solid rgba(130,130,130,.35)"
    address = quote(path.as_posix())
    return f'<iframe src="{address}" style="{style};border-radius:8px"></iframe>'


def _fill(out: Any, page: str) -> None:
    """Replace what an Output widget shows; unlike `with out`, from any thread."""
    data = {"text/html": page, "text/plain": say("an export")}
    out.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
