"""Uploads, to a stand-in for the Hugging Face hub on this machine."""

import http.server
import json
import os
import threading

import pytest

from bitllm.export import push_to_hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as an upload asks for; keeps what it is sent."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        data = json.dumps(self.reply_to(self.path.split("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reply_to(self, path, body):
        base = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            return {"url": f"{base}/me/model", "name": "me/model", "id": "1"}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = [f["path"] for f in json.loads(body)["files"]]
            return {
                "files": [
                    {
                        "path": name,
                        "uploadMode": modes[name.endswith("model.safetensors")],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for name in files
                ]
            }
        if path.endswith("/objects/batch"):
            upload = {"actions": {"upload": {"href": f"{base}/put"}}}
            objects = [{**given, **upload} for given in json.loads(body)["objects"]]
            return {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return {"commitUrl": f"{base}/me/model/commit/1", "commitOid": "1", "hookOutput": ""}
        return {}

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


def test_an_export_is_uploaded_and_the_token_stays_secret(tiny_run, run_cli, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": "hf_not_to_be_seen",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        command = ("export", "--model", tiny_run, "--to", "hf", "--out", tmp_path / "hf")
        result = run_cli(*command, "--push-to-hub", "me/model", env=environment)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert "uploaded: http://127.0.0.1" in result.stdout
    asked = {path.split("?")[0]: (token, body) for path, token, body in server.requests}
    assert asked["/api/models/me/model/commit/main"][0] == "Bearer hf_not_to_be_seen"
    assert json.loads(asked["/api/repos/create"][1])["visibility"] == "private"
    assert asked["/put"][1] == (tmp_path / "hf" / "model.safetensors").read_bytes()
    commit = asked["/api/models/me/model/commit/main"][1].decode()
    for file in (tmp_path / "hf").iterdir():
        assert file.name in commit
    assert "hf_not_to_be_seen" not in result.stdout + result.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_not_to_be_seen" not in file.read_bytes()


def test_a_wrong_upload_is_explained(tmp_path):
    with pytest.raises(ValueError, match="repo_id='model': expected OWNER/NAME"):
        push_to_hub(tmp_path, "model")
    with pytest.raises(FileNotFoundError, match="export first"):
        push_to_hub(tmp_path / "none", "me/model")
