"""A stand-in for the Hugging Face hub on this machine: one data set or model, with faults.

`HF_ENDPOINT` points the real `datasets` and `huggingface_hub` at it, so that a test takes the way
that a user's download takes: the repository's listing, then ranges of its files.
"""

import contextlib
import hashlib
import http.server
import json
import random
import re
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of `folder` as the data set, and as the model, `me/stories`.

    Args:
        failing: share of the requests that go wrong, each in one of the ways of `FAULTS`.
    """

    FAULTS = ("429", "500", "503", "cut", "stall")
    daemon_threads = True

    def __init__(self, folder: Path, failing: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.failing, self.chance = folder, failing, random.Random(seed)
        self.stall_s = 3.0
        self.requests, self.faults, self.bytes_sent = [], [], 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, request: str) -> str:
        with self.lock:
            self.requests.append(request)
            found = self.chance.random() < self.failing
            kind = self.chance.choice(self.FAULTS) if found else ""
            self.faults += [kind] if kind else []
            return kind

    def handle_error(self, request, client_address):
        pass  # a client that hung up after its own time-out

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def entry(self, path: Path) -> dict:
        data = path.read_bytes()
        name = path.relative_to(self.server.folder).as_posix()
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "oid": oid, "size": len(data), "path": name}

    def entries(self) -> list[dict]:
        return [self.entry(p) for p in sorted(self.server.folder.rglob("*")) if p.is_file()]

    def reply(self, value, status=200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def send(self, data: bytes, status: int, headers: dict, cut: bool = False) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            data = data[: len(data) // 2] if cut else data
            self.wfile.write(data)
            self.server.bytes_sent += len(data)
        if cut:
            self.close_connection = True

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(length)
        fault = self.server.fault(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if fault.isdigit():
            self.reply({"error": "too many requests"}, int(fault))
            return
        if fault == "stall":
            time.sleep(self.server.stall_s)
        if found := re.fullmatch(r"(?:/datasets)?/me/stories/resolve/[^/]+/(.+)", path):
            self.file(self.server.folder / found[1], cut=fault == "cut")
        elif re.fullmatch(r"/api/(datasets|models)/me/stories/tree/.+", path):
            self.reply(self.entries())
        elif re.fullmatch(r"/api/datasets/me/stories/paths-info/.+", path):
            wanted = self.paths(asked)
            self.reply([e for e in self.entries() if e["path"] in wanted])
        elif re.fullmatch(r"/api/(datasets|models)/me/stories(/revision/.+)?", path):
            siblings = [{"rfilename": e["path"]} for e in self.entries()]
            self.reply(
                {
                    "id": "me/stories",
                    "sha": COMMIT,
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                }
            )
        else:
            self.reply({"error": "Entry not found"}, 404)

    @staticmethod
    def paths(asked: bytes) -> list[str]:
        with contextlib.suppress(ValueError):
            return json.loads(asked)["paths"]
        return [unquote(p.split("=", 1)[1]) for p in asked.decode().split("&") if p[:5] == "paths"]

    def file(self, path: Path, cut: bool) -> None:
        if not path.is_file():
            self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, size = int(part[1]), int(part[2] or len(data) - 1), len(data)
            end, status = min(end, size - 1), 206
            data = data[begin : end + 1]
            headers["Content-Range"] = f"bytes {begin}-{end}/{size}"
        self.send(data, status, headers, cut)

    do_GET = do_POST = do_HEAD = answer

    def log_message(self, *_):
        pass
