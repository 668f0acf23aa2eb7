"""A stand-in for the Hugging Face hub on this machine: data sets and models, with faults.

`HF_ENDPOINT` points the real `datasets` and `huggingface_hub` at it, so that a test takes the way
that a user's download takes: the repository's listing, then ranges of its files. What is uploaded
to `me/stories` is there from then on.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests import warm
from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of `folder` as the data set, and as the model, `me/stories`.

    Args:
        others: folders of further models, me/NAME by name. `me/gated` is there for others only.
        failing: share of the requests that go wrong, each in one of the ways of `FAULTS`.
    """

    FAULTS = ("429", "500", "503", "cut", "stall")
    daemon_threads = True

    def __init__(self, folder: Path, failing: float = 0.0, seed: int = 0, others=None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders, self.tokens = {"stories": folder, **(others or {})}, set()
        self.created, self.uploads = [], {}
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

    def python(self, home: Path, code: str, *arguments, **options):
        """Run Python code in a process that takes this for the hub; `home` has its cache."""
        variables = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_secret"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        variables = {**os.environ, **variables, **options.pop("variables", {})}
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False, **options}
        return warm.run(command, env=variables, **options)

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

    def entry(self, path: Path, folder: Path) -> dict:
        data = path.read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        name = path.relative_to(folder).as_posix()
        return {"type": "file", "oid": oid, "size": len(data), "path": name}

    def entries(self, name: str) -> list[dict]:
        folder = self.server.folders[name]
        return [self.entry(p, folder) for p in sorted(folder.rglob("*")) if p.is_file()]

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
        if path.startswith("/api/models/me/gated"):
            self.send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        elif self.command == "PUT" or path.startswith("/api/repos/") or "/commit/" in path:
            self.reply(self.upload(path, asked))
        elif path == "/api/validate-yaml" or "/preupload/" in path or path.endswith("/batch"):
            self.reply(self.upload(path, asked))
        elif found := re.fullmatch(r"(?:/datasets)?/me/(\w+)/resolve/[^/]+/(.+)", path):
            folder = self.server.folders.get(found[1], Path("none"))
            self.file(folder / found[2], cut=fault == "cut")
        elif not (found := re.match(r"/api/(?:datasets|models)/me/(\w+)", path)):
            self.reply({"error": "Entry not found"}, 404)
        elif (name := found[1]) not in self.server.folders:
            self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self.reply(self.entries(name))
        elif "/paths-info/" in path:
            wanted = self.paths(asked)
            self.reply([e for e in self.entries(name) if e["path"] in wanted])
        else:
            siblings = [{"rfilename": e["path"]} for e in self.entries(name)]
            facts = {"id": f"me/{name}", "sha": COMMIT, "siblings": siblings}
            self.reply({**facts, "tags": [], "private": False})

    def upload(self, path: str, asked: bytes) -> dict:
        """One request of an upload; the last, a commit, writes files into the folder."""
        server = self.server
        server.tokens.add(self.headers.get("Authorization"))
        if self.command == "PUT":
            server.uploads[path.rpartition("/")[2]] = asked
        elif path == "/api/repos/create":
            server.created.append(json.loads(asked))
            return {"url": f"{server.address}/me/stories", "name": "me/stories", "id": "1"}
        elif "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(asked)["files"]]
            more = {"shouldIgnore": False, "oid": None}
            lfs = (".safetensors", ".gguf", ".html")
            return {
                "files": [{"path": f, "uploadMode": modes[f.endswith(lfs)], **more} for f in files]
            }
        elif path.endswith("/objects/batch"):
            objects = json.loads(asked)["objects"]
            for part in objects:
                part["actions"] = {"upload": {"href": f"{server.address}/put/{part['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        elif "/commit/" in path:
            for line in map(json.loads, asked.splitlines()):
                value = line["value"]
                if line["key"] == "lfsFile":
                    (server.folder / value["path"]).write_bytes(server.uploads[value["oid"]])
                elif line["key"] == "file":
                    data = base64.b64decode(value["content"])
                    (server.folder / value["path"]).write_bytes(data)
            return {"commitUrl": f"{server.address}/me/stories/commit/1", "commitOid": "1"}
        return {}

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

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def log_message(self, *_):
        pass
