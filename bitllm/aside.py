"""What a run's folder has besides a run: something else, or an earlier run (`--resume never`)."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

log = logging.getLogger("bitllm")

SET_ASIDE, FOREIGN = "set-aside-", {"desktop.ini", "Thumbs.db", "lost+found"}  # in any folder


def check_run_folder(folder: Path) -> None:
    """ValueError for a file, or a folder of something else. Nothing is written."""
    ours = {"config.json", "checkpoints", "tokenizer.json", "metrics.jsonl", "data", "lock.json"}
    names = sorted({path.name for path in folder.glob("[!.]*")} - FOREIGN)
    if folder.is_file() or (names and not {*ours, f"{SET_ASIDE}1"} & {*names}):
        what = "a file" if folder.is_file() else ", ".join(names[:3]) + " in it"
        raise ValueError(f"{folder}: not a run folder ({what}); expected a folder, new or a run's")


def set_aside(folder: Path, keep_data: bool) -> None:
    """Move what a run left to a folder inside it, so that another can begin; nothing is lost."""
    kept = {"lock.json", *FOREIGN, *(("data", "tokenizer.json") if keep_data else ())}
    left = [p for p in folder.glob("[!.]*") if p.name not in kept and SET_ASIDE not in p.name]
    numbered = (folder / f"{SET_ASIDE}{n}" for n in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    for path in left:
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    if left:
        log.info(f"{folder}: the run in it was moved to {target}")
