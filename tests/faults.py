"""Faults on purpose: folders that refuse, lie or lag, processes killed at random, damaged files.

`inject` puts faults under one folder and leaves every other alone; `killed_run` kills a process
again and again until its work is done; `corrupt` damages a file. None of them knows anything of
checkpoints, so that other projects can take this file and `warm.py`, and change the four names it
patches.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import bitllm_core as bit
from bitllm import mirror
from tests import warm

ERRORS = {
    "ENOSPC": errno.ENOSPC,  # disk or quota full
    "EIO": errno.EIO,  # Drive, often its quota
    "ENOTCONN": errno.ENOTCONN,  # Drive: transport endpoint is not connected
    "EACCES": errno.EACCES,  # permission denied, read-only
}
SILENT = ("short write", "torn rename", "delayed visibility", "vanished folder")
OPERATIONS = ("names", "write", "read", "size", "remove", "rename", "replace")


@dataclass
class Fault:
    """What goes wrong at the `at`-th call of an operation (from 1), and the `times` - 1 after it.

    operation: of `bit.Folder`, or "replace" for a small file that is written beside and renamed.
    """

    kind: str
    operation: str
    at: int = 1
    times: int = 1

    def strikes(self, operation: str, call: int) -> bool:
        return operation == self.operation and self.at <= call < self.at + self.times


@dataclass
class Injection:
    """Faults at work under `where`; `calls` counts each operation, `struck` those that failed."""

    where: Path
    faults: Sequence[Fault] = ()
    calls: Counter[str] = field(default_factory=Counter)
    struck: int = 0
    hidden: dict[Path, int] = field(default_factory=dict)
    """files that are not visible yet, for how many more looks"""

    def check(self, operation: str, path: Path) -> str | None:
        """Count a call; raise what is due, or return the kind of a silent fault."""
        if not path.is_relative_to(self.where):
            return None
        self.calls[operation] += 1
        for fault in self.faults:
            if fault.strikes(operation, self.calls[operation]):
                self.struck += 1
                if fault.kind in ERRORS:
                    number = ERRORS[fault.kind]
                    raise OSError(number, os.strerror(number), str(path))
                return fault.kind
        return None

    def still_hidden(self, path: Path) -> bool:
        if self.hidden.get(path, 0) <= 0:
            return False
        self.hidden[path] -= 1
        return True


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # as long as before
    path.write_bytes(data)


def faulty_folder(state: Injection) -> type[mirror.Folder]:
    """A folder whose operations fail as `state` says."""

    class FaultyFolder(mirror.Folder):
        def names(self):
            kind = state.check("names", self.path)
            names = super().names()
            if kind == "delayed visibility":
                return names[:-1]
            return [name for name in names if not state.still_hidden(self.path / name)]

        def write(self, name, fill):
            path, kind = self.path / name, None

            def faulty(path):
                nonlocal kind
                try:
                    kind = state.check("write", path)
                except OSError:  # half of it is there when the disk refuses
                    fill(path)
                    _halve(path)
                    raise
                if kind == "vanished folder":
                    for file in self.path.iterdir():
                        file.unlink()
                    self.path.rmdir()
                fill(path)
                if kind in ("short write", "altered write"):
                    (_halve if kind == "short write" else _alter)(path)

            super().write(name, faulty)
            if kind == "delayed visibility":
                state.hidden[path] = 3

        def read(self, name):
            state.check("read", self.path / name)
            if state.still_hidden(self.path / name):
                raise FileNotFoundError(errno.ENOENT, "not there yet", name)
            return super().read(name)

        def size(self, name):
            state.check("size", self.path / name)
            return super().size(name)

        def rename(self, old, new):
            if state.check("rename", self.path / new) == "torn rename":  # gone, or half of it there
                data = (self.path / old).read_bytes()
                (self.path / new).write_bytes(data[: len(data) // 2])
                (self.path / old).unlink()
            else:
                super().rename(old, new)

        def remove(self, name):
            state.check("remove", self.path / name)
            super().remove(name)

    return FaultyFolder


@contextlib.contextmanager
def inject(where: Path, *faults: Fault) -> Iterator[Injection]:
    """Let operations on files below `where` fail as `faults` say."""
    state = Injection(where, faults)
    plain_replace, plain_hash = bit.write_atomically, bit.file_hash
    folder = faulty_folder(state)

    def file_hash(path):
        if path.suffix in (".safetensors", bit.PART):
            state.check("read", path)
        return plain_hash(path)

    def replace(path, data):
        kind = state.check("replace", path)
        plain_replace(path, data[: len(data) // 2] if kind == "torn rename" else data)

    with (
        mock.patch.object(bit, "Folder", folder),
        mock.patch.object(mirror, "Folder", folder),
        mock.patch.object(bit, "write_atomically", replace),
        mock.patch.object(bit, "file_hash", file_hash),
    ):
        yield state


def matrix(calls: Counter[str], most: int = 99) -> Iterator[Fault]:
    """Every fault at every call that a session without faults makes, once and from then on."""
    for operation in OPERATIONS:
        kinds = [*ERRORS]
        kinds += {
            "write": ["short write", "delayed visibility", "vanished folder"],
            "names": ["delayed visibility"],
            "rename": ["torn rename"],
            "replace": ["torn rename"],
        }.get(operation, [])
        places = range(1, min(calls[operation], most) + 1)
        for kind, at, times in itertools.product(kinds, places, (1, 10**9)):
            if kind in ERRORS or times == 1:
                yield Fault(kind, operation, at, times)


def corrupt(path: Path, chance: random.Random) -> str:
    """Damage a file at a random place; return what was done."""
    data = bytearray(path.read_bytes())
    how = chance.choice(["bit flipped", "block zeroed", "truncated", "emptied", "extended"])
    at = chance.randrange(len(data))
    if how == "bit flipped":
        data[at] ^= 1 << chance.randrange(8)
    elif how == "block zeroed":
        size = len(data[at : at + 512])
        if not any(data[at : at + size]):  # zeros already: zeroing them would change nothing
            return corrupt(path, chance)
        data[at : at + size] = bytes(size)
    elif how == "truncated":
        del data[at:]
    elif how == "emptied":
        data.clear()
    else:
        data += bytes(chance.randrange(1, 512))
    path.write_bytes(data)
    return f"{how} at {at}"


def killed_run(
    command: Sequence[str],
    chance: random.Random,
    rounds: int,
    number: int = signal.SIGKILL,
    seconds: float = 0.0,
) -> list[int]:
    """Start `command` again and again, killing it after a random time, until it ends by itself.

    Args:
        seconds: that the command takes undisturbed; it is killed in the last nine tenths of them,
            for the first tenth is Python's beginning.

    Returns:
        the exit codes; the last is of the run that was let go to its end.
    """
    codes = []
    for _ in range(rounds):
        process = warm.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=chance.uniform(seconds / 10, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.communicate(timeout=120)
        codes.append(process.returncode)
        if process.returncode == 0:
            return codes
        time.sleep(0.02)
    codes.append(warm.run(command, capture_output=True, timeout=300, check=False).returncode)
    return codes
