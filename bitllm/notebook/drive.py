"""Google Drive in Colab."""

from __future__ import annotations

from pathlib import Path

from bitllm.notebook.language import say
from bitllm_core import first_line


def mount_drive(mount_point: str = "/content/drive", timeout_s: int = 120) -> Path | None:
    """Mount Google Drive in Colab and return the folder for copies; None, with a note, if it fails.

    Drive is optional: if access is refused or times out, training works without it.
    """
    try:
        from google.colab import drive  # type: ignore[import-not-found]
    except ImportError:
        print(
            say("Drive: this is not Colab, so there is nothing to mount; runs stay in this folder")
        )
        return None
    try:
        drive.mount(mount_point, timeout_ms=1000 * timeout_s)
        folder = Path(mount_point) / "MyDrive" / "bitllm"
        folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # Colab raises classes of its own; none may stop the notebook
        text = say(
            "Drive: not mounted ({error}). Training works without it, but the run is lost when "
            "Colab takes the machine back. To try again, run this cell once more and allow access "
            "within two minutes",
            error=f"{type(error).__name__}: {first_line(error)}",
        )
        print(text)
        return None
    print(say("Drive: mounted; checkpoints are copied to MyDrive/bitllm"))
    return folder
