"""A headless Chromium driven through its DevTools pipe, with nothing but the standard library."""

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
from select import select
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--force-color-profile=srgb",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


def find() -> str | None:
    """The browser's program: $CHROMIUM, or the first known name on the path; None where there is none."""
    return next(filter(None, (shutil.which(name) for name in (os.environ.get("CHROMIUM", ""), *NAMES) if name)), None)


class Page:
    """One tab. `requests`, `errors`: what it asked for and complained of since it was opened."""

    def __init__(self, to_browser: int, from_browser: int, timeout_s: float = 60) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._to, self._from, self._timeout_s = to_browser, from_browser, timeout_s
        self._buffer, self._next_id, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + self._timeout_s
        while self.evaluate("location.href") != url or self.evaluate("document.readyState") != "complete":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not load in {self._timeout_s} s")
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression[:80]}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def show(self, *, width: int, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        """Take the size and colour scheme of a device; below 600 pixels it is a phone."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, to: Path, selector: str = "html") -> Path:
        """A PNG of one element, also of what is below the window."""
        measure = (
            "(e => { const b = e.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height] })"
        )
        x, y, width, height = self.evaluate(f"{measure}(document.querySelector({json.dumps(selector)}))")
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        return self.save_picture(to, captureBeyondViewport=True, clip=clip)

    def save_picture(self, to: Path, **what: Any) -> Path:
        """A PNG of the window as it stands, or of what the protocol's own parameters name."""
        shot = self.call("Page.captureScreenshot", format="png", **what)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(base64.b64decode(shot["data"]))
        return to

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select([self._from], [], [], self._timeout_s)[0]:
                raise TimeoutError(f"the browser was silent for {self._timeout_s} s")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])


@contextmanager
def browse(program: str) -> Iterator[Page]:
    """Start a browser with an empty profile and give its page; end it afterwards."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def wire() -> None:  # the protocol uses file descriptors 3 (in) and 4 (out)
        read, write = os.dup(to_read), os.dup(from_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, f"--user-data-dir={profile}", *FLAGS],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Page(to_write, from_read)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(to_write)
            os.close(from_read)
