"""A second folder that checkpoints are copied to while training runs, such as one on Google Drive.

The mirror is a run folder too: on a fresh machine, a run resumes from it. One process at a time
writes to it, as its lease file shows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitllm_core as core
from bitllm.aside import check_run_folder
from bitllm_core import checkpoint_step, list_checkpoints, load_checkpoint, log, read_json

RETRY_S = (2.0, 300.0)
"""Seconds until a failed copy is tried again: at first, doubling each time, and at most."""
FINISH_S = 120.0
"""Seconds that the mirror gets at the end of a session to take what is not there yet."""
BLOCK_BYTES = 4 << 20
"""Copied and hashed at once."""
LEASE_NAME = "lock.json"
LEASE_RENEW_S = 60.0
"""Seconds between signs of life in a lease file."""
LEASE_STALE_S = 300.0
"""Seconds without one after which a lease is taken over."""


class Folder(core.Folder):
    """A folder that files are copied from and to."""

    def read(self, name: str) -> Iterator[bytes]:
        """Blocks of a regular file of this folder: links out of it, pipes, ... are refused."""
        path = self.path / name
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with path.open("rb") as file:
            yield from iter(partial(file.read, BLOCK_BYTES), b"")

    def digest(self, name: str) -> str:
        """sha256 of a file as it reads now."""
        digest = hashlib.sha256()
        for block in self.read(name):
            digest.update(block)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Delete a file, emptied first: in Drive's trash it would still use the quota."""
        with contextlib.suppress(FileNotFoundError):
            status = (self.path / name).lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # not someone else's, too
                os.truncate(self.path / name, 0)
        super().remove(name)


def check_mirror(out: Path, mirror: Path) -> None:
    """ValueError for a folder that cannot be a mirror of `out`."""
    if not mirror.absolute().parent.is_dir():
        raise ValueError(
            f"mirror={str(mirror)!r}: expected a folder in one that exists; "
            f"{mirror.parent} does not. Is the drive mounted?"
        )
    one, other = out.resolve(), mirror.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"mirror={str(mirror)!r}: expected a folder apart from {out}")
    with contextlib.suppress(OSError):  # not readable now; it is tried again
        check_run_folder(mirror)


class Lease:
    """One writer at a time, on any file system: a file with the writer's id, renewed every minute.

    A lease without a sign of life for `LEASE_STALE_S` is taken over, and one that this run folder
    itself left behind at once: its lock shows that the process which had it is gone.

    Args:
        folder: what to write to.
        run: the run folder, whose lock this process holds.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.path, self.own = folder, folder / LEASE_NAME, run / ".lease"
        self.id, self.host = uuid.uuid4().hex, platform.node()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, if need be after waiting for a stale one to run out; again: no effect.

        Raises:
            ValueError: another process has it.
            OSError: the folder cannot be read or written.
        """
        if self._thread:
            if self.lost():
                raise ValueError(f"{self.folder}: another process has taken it over")
            return
        first = holder = self._holder()
        before = (read_json(self.own) or {}).get("id")
        while holder and holder["id"] != before and _age(holder) <= LEASE_STALE_S:
            if first and holder["alive"] != first["alive"]:
                raise ValueError(self._refusal(holder))
            if holder is first:
                log.info(f"{self._refusal(holder)}; waiting for that")
            time.sleep(min(1.0, LEASE_STALE_S / 10))
            holder = self._holder()
        if holder:
            log.info(f"{self.folder}: taking over from a process that is gone")
            self.path.unlink(missing_ok=True)
        core.write_atomically(self.own, json.dumps({"id": self.id}).encode())
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:  # two at the same moment: the first has it
            raise ValueError(self._refusal(self._holder() or {})) from None
        if holder:
            time.sleep(0.2)  # another may have found the same stale lease: the later one has it
            if self.lost():
                raise ValueError(self._refusal(self._holder() or {}))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Delete the file, unless it is another's by now."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._thread and not self.lost():
                self.path.unlink(missing_ok=True)
        self._thread = None

    def lost(self) -> bool:
        """Whether another process has the folder now, as when this one was asleep for long."""
        with contextlib.suppress(OSError):
            holder = self._holder()
            return holder is not None and holder["id"] != self.id
        return False

    def _text(self) -> str:
        return json.dumps({"id": self.id, "host": self.host, "alive": time.time()})

    def _holder(self) -> dict[str, Any] | None:
        """Who has the folder; None: nobody. A torn file belongs to nobody who is still alive."""
        for _ in range(3):
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                if isinstance(found["id"], str) and isinstance(found["alive"], (int, float)):
                    return found
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError, RecursionError):
                time.sleep(0.05)  # it may be just being written
        return {"id": "", "alive": 0.0}

    def _renew(self) -> None:
        while not self._released.wait(LEASE_RENEW_S) and not self.lost():
            with contextlib.suppress(OSError):  # the next minute may be better
                # in place: a file that is replaced every minute would fill Drive's trash
                self.path.write_text(self._text(), encoding="utf-8")

    def _refusal(self, holder: dict[str, Any]) -> str:
        alive = holder.get("alive", 0)
        until = time.strftime("%H:%M:%S", time.localtime(alive + LEASE_STALE_S))
        return (
            f"{self.folder} is being written by a process on {holder.get('host', '?')}, last sign "
            f"of life {_age(holder):.0f} s ago. Stop that one or choose another folder; without a "
            f"further sign it is taken over at {until}"
        )


def _age(holder: dict[str, Any]) -> float:
    return abs(time.time() - holder.get("alive", 0))


@contextlib.contextmanager
def _known() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error}: whether there is a run to resume is not known. Mount the drive, or leave "
            "--mirror out"
        ) from error


class Mirror:
    """Copies finished checkpoints of a run to a second folder, which becomes a run folder.

    A thread of its own copies; training never waits for it and never ends because of it. What it
    cannot keep up with is left out: the newest comes next.

    Args:
        run: the run folder to copy from.
        folder: created if need be; its parent must exist.
        keep: how many of the newest stay, besides the best.

    Raises:
        ValueError: another process writes to `folder`.
    """

    def __init__(self, run: Path, folder: Path, keep: int) -> None:
        self.run, self.folder, self.keep = run, folder, {"step": keep, "best": 1}
        self.copying = ""
        """name of the checkpoint on its way"""
        self.last_good_step: int | None = None
        self.errors = 0
        """since the last success"""
        self._failing_since = 0.0
        self._last_error = ""
        self._bytes = [0, 0]  # copied, of how many
        self._pending: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._ended = threading.Event()
        self.lease = Lease(folder, run)
        try:
            folder.mkdir(exist_ok=True)
            self.lease.acquire()
        except OSError as error:
            self._failed(error)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def has_checkpoints(self) -> bool:
        """ValueError where the mirror cannot be read."""
        with _known():
            return bool(list_checkpoints(self.folder / "checkpoints"))

    def newest_checkpoint(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest whole checkpoint of run and mirror; the run folder then has all of it.

        Raises:
            ValueError: the mirror belongs to another run, or cannot be read and the run has none.
        """
        with contextlib.suppress(OSError):
            _check_settings(self.folder, settings)
        local, mirrored = Folder(self.run / "checkpoints"), Folder(self.folder / "checkpoints")
        found = core.newest_checkpoint(local.path)
        try:
            newer = fetch_checkpoint(mirrored, local, "step", found["step"] if found else -1)
            found = newer or found
            if found:
                fetch_files(self.run, self.folder, settings)
                best = core.newest_checkpoint(local.path, "best")
                fetch_checkpoint(mirrored, local, "best", best["step"] if best else -1)
        except OSError as error:
            if not found:
                with _known():
                    raise
            log.warning(f"skipped: {error}")
        return found

    def offer(self, kind: str, name: str) -> None:
        """A checkpoint is ready; one of its kind that still waits is left out."""
        with self._changed:
            self._pending[kind] = name
            self._changed.notify()

    def offer_newest(self) -> None:
        """Offer what an earlier session could not copy; what is there is not copied again."""
        folder = Folder(self.run / "checkpoints")
        with contextlib.suppress(OSError):
            for kind in self.keep:
                paths = list_checkpoints(folder, kind)
                finished = [path for path in paths if core.is_finished(folder, path.name)]
                if finished:
                    self.offer(kind, finished[-1].name)

    def status(self) -> str:
        """One line to show."""
        if self.errors:
            since = time.strftime("%H:%M", time.localtime(self._failing_since))
            times = "1 error" if self.errors == 1 else f"{self.errors} errors"
            return (
                f"mirror: failing since {since} ({times}), {self._last_error}, "
                f"last good step {self.last_good_step or 'none'}"
            )
        if self.last_good_step is None:
            return "mirror: nothing copied yet"
        return f"mirror: step {self.last_good_step} is in {self.folder}"

    def close(self, timeout_s: float | None = None) -> bool:
        """Give it a bounded time to finish, with a progress bar; whether all is there."""
        from tqdm.auto import tqdm

        with self._changed:
            self._closing = True
            self._changed.notify()
        until = time.monotonic() + (FINISH_S if timeout_s is None else timeout_s)
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": 1.0}
        with tqdm(desc="mirror", delay=0.5, leave=False, **options) as bar:
            while time.monotonic() < until and not self._ended.wait(0.1):
                bar.total = self._bytes[1]
                bar.update(self._bytes[0] - bar.n)
        self._abandoned = True  # where a call to the file system hangs, its thread ends after it
        return self._ended.is_set() and not self.errors

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.offer_newest()
        self.close(1.0 if kind else None)
        if not kind:
            log.info(self.status())

    def _failed(self, error: Exception) -> None:
        if not self.errors:
            self._failing_since = time.time()
        self.errors += 1
        number = getattr(error, "errno", None)
        self._last_error = f"Errno {number}" if number else core.first_line(error)
        if self.errors == 1:
            log.warning(self.status())

    def _next(self) -> tuple[str, str] | None:
        """Wait for something to copy; None: closing, and nothing is left."""
        with self._changed:
            if self.errors and not self._closing:
                first, most = RETRY_S
                pause = min(first * 2.0 ** (self.errors - 1), most)
                self._changed.wait_for(lambda: self._closing, pause)
            self._changed.wait_for(lambda: self._pending or self._closing)
            if not self._pending or self._abandoned:
                return None
            kind = min(self._pending, key=lambda k: k != "step")  # what a resume needs first
            self.copying = self._pending.pop(kind)
            return kind, self.copying

    def _work(self) -> None:
        tries_left = 5  # once it is closing
        while (item := self._next()) is not None:
            kind, name = item
            try:
                self._copy(kind, name)
                recovered, self.errors = self.errors > 0, 0
                if kind == "step":
                    self.last_good_step = checkpoint_step(name)
                if recovered:
                    log.info(f"{self.status()}; it works again")
            except Exception as error:  # of whatever kind: training does not end because of it
                self._failed(error)
                tries_left -= self._closing
                if isinstance(error, OSError) and tries_left > 0:
                    with self._changed:
                        self._pending.setdefault(kind, name)
                    self._ended.wait(RETRY_S[0] if self._closing else 0)
            finally:
                self.copying = ""
        with contextlib.suppress(Exception):
            copy_small_files(Folder(self.run), Folder(self.folder))
        self.lease.release()
        self._ended.set()

    def _copy(self, kind: str, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        self.lease.acquire()
        for source, target in token_folders(self.run, self.folder):
            self._copy_token_files(source, target)
        copy_small_files(Folder(self.run), Folder(self.folder))
        source, target = Folder(self.run / "checkpoints"), Folder(self.folder / "checkpoints")
        core.remove_unfinished(target)
        self._bytes = [0, source.size(name)]
        if not core.is_finished(target, name) or (
            core.read_manifest(target, name) != core.read_manifest(source, name)
        ):
            copy_checkpoint(source, name, target, self._progress)
        core.prune_checkpoints(target, self.keep[kind], kind)

    def _progress(self, size: int) -> None:
        self._bytes[0] += size

    def _copy_token_files(self, source: Folder, target: Folder) -> None:
        """Once: tokenizing anew on another machine would take minutes, and might differ."""
        text = b"".join(source.read("manifest.json"))
        if "manifest.json" in target.names() and b"".join(target.read("manifest.json")) == text:
            return
        counts = json.loads(text)
        for split in ("train", "validation"):
            if not counts[split]["sha256"]:  # a stream's: they come from their source again
                continue
            name = f"{split}.bin"
            self._bytes = [0, source.size(name)]
            if copy_file(source, name, target, self._progress) != target.digest(name):
                raise OSError(errno.EIO, "what was read back is not what was written", name)
        target.write("manifest.json", lambda path: path.write_bytes(text))


def copy_small_files(source: Folder, target: Folder) -> None:
    """What lies beside the checkpoints and tokens of a run, where it differs."""
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        if name in source.names() and (
            name not in target.names() or source.digest(name) != target.digest(name)
        ):
            copy_file(source, name, target, None, name + core.PART)  # a failure keeps the old one
            target.remove(name)
            target.rename(name + core.PART, name)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    if (folder / "config.json").is_file():
        try:
            saved = core.checked_settings(
                core.read_json(folder / "config.json"), folder / "config.json"
            )
        except ValueError as error:
            log.warning(f"skipped: {error}")
        else:
            core.check_same_settings(folder, saved, settings)


def fetch_checkpoint(
    mirrored: Folder, local: Folder, kind: str, above: int
) -> dict[str, Any] | None:
    """Copy the newest whole checkpoint of the mirror above a step, and load it; None: none is."""
    for path in reversed(list_checkpoints(mirrored, kind)):
        if checkpoint_step(path) <= above:
            break
        try:
            local.path.mkdir(parents=True, exist_ok=True)
            copy_checkpoint(mirrored, path.name, local)
            log.info(f"fetched {path}")
            return load_checkpoint(local.path / path.name)
        except (ValueError, OSError) as error:
            log.warning(f"skipped: {error}")
    return None


def fetch_files(out: Path, mirror: Path, settings: dict[str, Any]) -> None:
    """Copy the log and the tokens where only the mirror has them."""
    source, target = Folder(mirror), Folder(out)
    if "metrics.jsonl" in source.names() and "metrics.jsonl" not in target.names():
        copy_file(source, "metrics.jsonl", target)
    config, size = core.DataConfig(**settings["data"]), settings["model"]["vocab_size"]
    if core.same_data(out, config, size) or not core.same_data(mirror, config, size):
        return
    for source, target in token_folders(mirror, out):
        for name in ("train.bin", "validation.bin", "manifest.json"):
            if name in source.names():  # of a stream, what trains comes from its source again
                copy_file(source, name, target)
    log.info(f"fetched {mirror / 'data'}")


def token_folders(source: Path, target: Path) -> Iterator[tuple[Folder, Folder]]:
    """Where a run has tokens, and where its copy has: those of a mixture's sources, then data/."""
    sources = (core.read_json(source / "data" / "manifest.json") or {}).get("mixture", [])
    for place in [*(f"data/{n}/data" for n in range(1, len(sources) + 1)), "data"]:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        yield Folder(source / place), Folder(target / place)


def copy_checkpoint(
    source: Folder, name: str, target: Folder, progress: Callable[[int], None] | None = None
) -> None:
    """Copy a checkpoint to another folder; its manifest comes last, once it reads back right.

    Raises:
        ValueError: the source is not whole.
        OSError: a file system refused, or what was read back is not what was written.
    """
    manifest, part = core.read_manifest(source, name), name + core.PART
    if copy_file(source, name, target, progress, part) != manifest["sha256"]:
        target.remove(part)
        raise ValueError(f"{source.path / name}: damaged (its sha256 is not its manifest's)")
    if target.digest(part) != manifest["sha256"]:
        raise OSError(errno.EIO, "what was read back is not what was written", str(target.path))
    core.publish(target, manifest)


def copy_file(
    source: Folder,
    name: str,
    target: Folder,
    progress: Callable[[int], None] | None = None,
    new_name: str = "",
) -> str:
    """Copy one file in blocks; return the sha256 of what was read."""
    digest = hashlib.sha256()

    def fill(path: Path) -> None:
        with path.open("xb") as file:
            for block in source.read(name):
                digest.update(block)
                file.write(block)
                if progress:
                    progress(len(block))

    target.write(new_name or name, fill)
    return digest.hexdigest()
