"""A headless Chromium, driven over a pipe by the DevTools protocol: no port, no driver, no package.

`Page` opens one file, runs scripts and keys in it, and keeps what it wrote to its console and what
it asked for.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT = 60.0  # seconds for one answer


def find() -> str | None:
    """The browser: $CHROMIUM, or the first of `NAMES` that is on the path."""
    given = os.environ.get("CHROMIUM")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running browser. Messages are JSON that ends with a zero byte."""

    def __init__(self, binary: str, profile: str):
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        shell = 'exec "$@" 3<&"$C" 4>&"$A"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", binary, *FLAGS, f"--user-data-dir={profile}"],
            env={**os.environ, "C": str(commands), "A": str(answers)},
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._pending, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command; what the browser tells meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + TIMEOUT
        while time.monotonic() < limit:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)
        raise TimeoutError(f"{method} was not answered in {TIMEOUT:.0f} s")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser ended"
            self._pending += piece
        message, self._pending = self._pending.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        try:
            self.call("Browser.close")
        finally:
            os.close(self._out)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._in)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    binary = find()
    assert binary is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = Browser(binary, profile)
        try:
            yield running
        finally:
            running.close()


class Frame:
    """Something that runs scripts: a tab, or a frame in it that has a process of its own."""

    _browser: Browser
    _session: str

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30.0) -> None:
        limit = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < limit, f"never true: {script}"
            time.sleep(0.02)


class Page(Frame):
    """One file in a tab of its own."""

    def __init__(self, running: Browser, path: Path, width: int = 1280, dark: bool = False):
        self._browser, self._path = running, path
        running.events.clear()
        target = running.call("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        attached = running.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # Times of the page's own thread: other work on the machine does not count.
        self.call("Performance.enable", timeDomain="threadTicks")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def frame(self) -> Frame:
        """The frame in the page that is isolated from it."""
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False,
                  flatten=True)  # fmt: skip
        limit = time.monotonic() + TIMEOUT
        while time.monotonic() < limit:
            self.run("0")
            for event in self._mine():
                if event["method"] == "Target.attachedToTarget":
                    found = Frame()
                    found._browser, found._session = self._browser, event["params"]["sessionId"]
                    return found
        raise TimeoutError("there is no isolated frame")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, as a mouse does."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.mouse(*box)

    def mouse(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, violations of the page's policy, exceptions."""
        self.run("0")  # what was told before this answer has arrived with it
        found = []
        for event in self._mine():
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"console.{params['type']}")
        return found

    @property
    def requests(self) -> list[str]:
        """What it asked for, but for itself and what it has in it."""
        self.run("0")
        urls = (e["params"]["request"]["url"] for e in self._mine()
                if e["method"] == "Network.requestWillBeSent")  # fmt: skip
        return [url for url in urls if url != self._path.as_uri() and not url.startswith("data:")]

    def _mine(self) -> Iterator[dict[str, Any]]:
        return (e for e in self._browser.events if e.get("sessionId") == self._session)

    @property
    def busy_seconds(self) -> float:
        """Time that the page's thread has worked since it was opened."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
