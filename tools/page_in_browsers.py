"""Open a page that `export --to html` wrote in real browsers, and compare it with llama.cpp here.

    python tools/page_in_browsers.py docs/demo.html
    python tools/page_in_browsers.py docs/demo.html --picture docs/demo.png
    python tools/page_in_browsers.py chat.html --prompt "hello" "what are you?" --picture chat.png

It needs requirements-test.txt and any of Debian's packages `chromium`, `firefox-esr`, and
`webkit2gtk-driver` with `xvfb` (WebKit: the engine of Safari). One JSON object per browser goes to
stdout. The tests of the page use the same functions.
"""

import argparse
import base64
import gzip
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bitllm_core as bit
from bitllm.export import llama_cpp_stream

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser")  # the first opens quickest
QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")


class Chromium:
    """Through playwright."""

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)

    def __init__(self):
        from playwright.sync_api import sync_playwright

        arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=self.path, args=arguments)
        self.page, self.requests = self.new_page(), []

    def new_page(self, **options):
        page = self.browser.new_page(**options)
        page.set_default_timeout(60_000)
        return page

    def open(self, address):
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address, wait_until="commit")

    def ask(self, expression):
        return self.page.evaluate(expression)

    def close(self):
        self.browser.close()
        self.playwright.stop()


class Firefox:
    """Through WebDriver BiDi, which needs no driver besides Firefox."""

    path = shutil.which("firefox-esr") or shutil.which("firefox")

    def __init__(self):
        import websocket

        self.profile, self.requests, self.calls = tempfile.mkdtemp(), [], 0
        command = [self.path, "--headless", "--no-remote", "--profile", self.profile]
        self.log = Path(self.profile) / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--remote-debugging-port", "0"], stdout=log, stderr=log
            )
        address = wait_for(
            lambda: re.search(r"BiDi listening on (ws://\S+)", self.log.read_text(errors="replace"))
        )
        self.socket = websocket.create_connection(
            address[1] + "/session", suppress_origin=True, timeout=60
        )
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["network.beforeRequestSent"])
        self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method, **params):
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "network.beforeRequestSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self.calls:
                if message["type"] == "error":
                    raise RuntimeError(message)
                return message["result"]

    def open(self, address):
        self.call("browsingContext.navigate", context=self.context, url=address, wait="interactive")

    def ask(self, expression):
        answer = self.call(
            "script.evaluate",
            expression=f"Promise.resolve({expression}).then(JSON.stringify)",
            target={"context": self.context},
            awaitPromise=True,
        )
        if answer["type"] != "success":
            raise RuntimeError(answer)
        return json.loads(answer["result"].get("value", "null"))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.profile, ignore_errors=True)


class WebKit:
    """WebKitGTK's small browser through its WebDriver, on a screen of its own."""

    path = shutil.which("WebKitWebDriver")
    port = 4567
    requests = None
    """this driver does not report them"""

    def __init__(self):
        browser = next(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
        environment = {**os.environ, "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}  # for root
        screen = ["xvfb-run", "-a"] if shutil.which("xvfb-run") else []
        self.process = subprocess.Popen(
            [*screen, self.path, f"--port={self.port}"], env=environment, start_new_session=True
        )
        options = {"binary": str(browser), "args": ["--automation"]}
        wanted = {"browserName": "MiniBrowser", "webkitgtk:browserOptions": options}
        self.session = ""
        request = {"capabilities": {"alwaysMatch": wanted}}
        session = wait_for(lambda: self.call("POST", "", request))
        self.session = "/" + session["sessionId"]

    def call(self, method, path, body=None):
        address = f"http://127.0.0.1:{self.port}/session{self.session}{path}"
        data = json.dumps(body).encode() if body else None
        try:
            request = urllib.request.Request(address, data, method=method)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except ConnectionError:
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):  # not up yet
                return None
            raise

    def open(self, address):
        self.call("POST", "/url", {"url": address})

    def ask(self, expression):
        return self.call("POST", "/execute/sync", {"script": f"return {expression}", "args": []})

    def close(self):
        self.call("DELETE", "")
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


def wait_for(found, timeout=60, pause=0.05):
    end = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(pause)
    return value


def press_generate(browser, prompt, tokens, temperature=0.0, seed=0):
    """Set the form and press the button."""
    values = {"prompt": prompt, "length": tokens, "temperature": temperature, "seed": seed}
    browser.ask(
        f"""(() => {{
            for (const [id, value] of Object.entries({json.dumps(values)})) {{
                document.getElementById(id).value = value;
                document.getElementById(id).dispatchEvent(new Event("input"));
            }}
            document.getElementById("generate").click();
            return true;
        }})()"""
    )


def status_of(browser):
    return browser.ask("document.getElementById('status').textContent")


def finished(browser):
    """The status once it is final; else None."""
    status = status_of(browser)
    return status if re.match(r"Done|Stopped|It stopped|The model cannot", status) else None


def wait_finished(browser):
    return wait_for(lambda: finished(browser), 300)


def written_by(browser):
    """The text after the prompt, or the last answer of a conversation."""
    return browser.ask(
        "(document.querySelector('#talk > .turn:last-of-type .said')"
        " ?? document.getElementById('text')?.lastChild)?.textContent ?? ''"
    )


def speed_of(browser):
    """Generated tokens and tokens per second, from the line above the text."""
    line = browser.ask("document.getElementById('speed').textContent")
    found = re.match(r"([\d,]+) tokens(?:, ([\d,.]+) tokens/s)?", line)
    if not found:
        return 0, 0.0
    return int(found[1].replace(",", "")), float((found[2] or "0").replace(",", ""))


def write(browser, address, prompt, tokens):
    """Open the page, press Generate at once, and wait for the whole text."""
    begin = time.monotonic()
    browser.open(address)
    wait_for(lambda: browser.ask("document.getElementById('generate')?.disabled === false"))
    press_generate(browser, prompt, tokens)
    wait_for(lambda: speed_of(browser)[0] or finished(browser))
    first = time.monotonic() - begin
    status = wait_finished(browser)
    count, speed = speed_of(browser)
    return {
        "text": written_by(browser),
        "tokens": count,
        "status": status,
        "first_token_s": round(first, 2),
        "tokens_per_s": speed,
    }


def write_here(gguf, prompt, tokens):
    """The same with llama.cpp in this process, half of the cores (of two: one thread)."""
    sampling = bit.SamplingConfig(temperature=0, max_new_tokens=tokens)
    pieces, times = [], []
    for piece in llama_cpp_stream(gguf, prompt, sampling):
        pieces.append(piece)
        times.append(time.monotonic())
    speed = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    return {"text": "".join(pieces), "tokens_per_s": round(speed, 1)}


def parts_of(page):
    """The two arguments of `page_files` that an exported one-file page was made from."""
    text = Path(page).read_text(encoding="utf-8")

    def element(pattern):
        return re.search(pattern, text, re.DOTALL)[1]

    parts = {
        name: gzip.decompress(base64.b64decode(element(f'<script id="{name}"[^>]*>(.*?)</script>')))
        for name in ("glue", "engine", "model")
    }
    parts["library"] = element(r"exports = module\.exports;\n(.*?)\nreturn module").encode()
    parts["licence"] = html.unescape(element(r"<pre>(.*?)</pre>")).encode()
    values = json.loads(element(r'<script id="told"[^>]*>(.*?)</script>'))
    return parts, values


def as_prompt(values, text):
    """A text as the model of a page is given it."""
    if not values.get("chat"):
        return text
    return f"<|im_start|>user\n{text.strip()}<|im_end|>\n<|im_start|>assistant\n"


def take_picture(page, prompts, path):
    """What a visitor sees once the model has generated a text, or answered to each prompt."""
    browser = Chromium()
    browser.page.set_viewport_size({"width": 420, "height": 638})
    browser.open(f"{page.resolve().as_uri()}#quiet")  # it answers nothing by itself
    browser.page.get_by_text("Ready.").wait_for()
    chats = browser.ask("Boolean(told.chat)")
    for prompt in prompts if chats else prompts[:1]:
        press_generate(browser, prompt, 100, temperature=0.3 if chats else 0.8)
        wait_finished(browser)
    browser.page.screenshot(path=path)
    browser.close()


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="one exported .html file")
    parser.add_argument(
        "--prompt", nargs="+", default=["The "], help="with --picture: a chat's, one after another"
    )
    parser.add_argument("--picture", type=Path, help="take one, and nothing else")
    flags = parser.parse_args()
    if flags.picture:
        take_picture(flags.page, flags.prompt, flags.picture)
        return
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        parts, values = parts_of(flags.page)
        gguf.write_bytes(parts["model"])
        prompt = as_prompt(values, flags.prompt[0])
        expected = write_here(gguf, prompt, 48)["text"]
        speed = write_here(gguf, prompt, 400)["tokens_per_s"]
    print(json.dumps({"llama.cpp here": {"text": expected, "tokens_per_s": speed}}))
    for kind in (Chromium, Firefox, WebKit):
        if kind.path is None:
            print(json.dumps({kind.__name__: "not on the path"}))
            continue
        browser = kind()
        try:
            found = write(browser, flags.page.resolve().as_uri(), flags.prompt[0], 48)
            found["same"] = found.pop("text") == expected
            press_generate(browser, flags.prompt[0], 400)
            wait_finished(browser)
            found["tokens_per_s"] = speed_of(browser)[1]
        finally:
            browser.close()
        print(json.dumps({kind.__name__: found}), flush=True)


if __name__ == "__main__":
    main()
