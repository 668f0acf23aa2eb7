"""Stand-ins for what surrounds a notebook in Colab: its server, and GitHub's archives."""

import contextlib
import http.server
import json
import threading
import urllib.parse


def opened(address):
    """Colab's list of sessions while a notebook from this address is open."""
    path = f"fileId={urllib.parse.quote(address, safe='')}"
    notebook = {"path": path, "name": "01_train.ipynb"}
    return json.dumps([{"id": "1", **notebook, "type": "notebook", "notebook": notebook}]).encode()


@contextlib.contextmanager
def server(pages, hang=False):
    """Serve pages (path -> bytes) on loopback; yields the address and the paths asked for.

    With `hang`, requests are taken and never answered.
    """
    asked, over = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if hang:
                over.wait(60)
            elif self.path in pages:
                self.send_response(200)
                self.send_header("Content-Length", str(len(pages[self.path])))
                self.end_headers()
                self.wfile.write(pages[self.path])
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{httpd.server_port}", asked
        finally:
            over.set()
            httpd.shutdown()
            thread.join()


def variables(address):
    """The environment variables by which Colab's kernel knows its server."""
    ip, port = address.split(":")
    return {"COLAB_JUPYTER_IP": ip, "KMP_TARGET_PORT": port}
