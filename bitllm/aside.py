"""Beginning anew in the folder of a run (`--resume never`): what is there is kept."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from bitllm_core import FOREIGN, SET_ASIDE

log = logging.getLogger("bitllm")


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
