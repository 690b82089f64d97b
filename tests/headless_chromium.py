"""A real browser for tests: Chromium without a window, driven by its DevTools protocol through a pipe."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
SECONDS = 60
# name -> (code, text it writes)
KEYS: dict[str, tuple[int, str | None]] = {
    "Tab": (9, None), "Enter": (13, "\r"), "Escape": (27, None), "PageUp": (33, None), "PageDown": (34, None),
    "End": (35, None), "Home": (36, None), "ArrowLeft": (37, None), "ArrowUp": (38, None), "ArrowRight": (39, None),
    "ArrowDown": (40, None),
}  # fmt: skip
MODIFIERS = {"Shift": 8}


def find_chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """One page in a browser of its own.

    Attributes:
        requests: addresses that were asked for, without data URIs.
        errors: uncaught exceptions and messages of the log (blocked by policy, failed loads).
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900)) -> None:
        # The browser reads commands from its descriptor 3 and answers on 4.
        ours, theirs = os.pipe(), os.pipe()
        inside = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (ours[0], theirs[1])]

        def place() -> None:
            os.dup2(inside[0], 3)
            os.dup2(inside[1], 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
        self.process = subprocess.Popen(
            [find_chromium() or "chromium", *options],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (ours[0], theirs[1], *inside):
            os.close(end)
        self.input, self.output = ours[1], theirs[0]
        self.numbers, self.buffer, self.session = itertools.count(1), b"", None
        self.requests: list[str] = []
        self.errors: list[str] = []
        (target,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*size)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.input, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, address: str) -> None:
        """Load a page and wait until it is complete."""
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Value of an expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS) -> Any:
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"never true: {script}")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def scheme(self, name: str) -> None:
        """Prefer ``light`` or ``dark``."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def mouse(self, x: float, y: float, click: bool = False) -> None:
        """Move the pointer, and perhaps click."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key of ``KEYS``, a letter, or a combination such as ``Shift+PageUp``."""
        *held, key = key.split("+") if len(key) > 1 else [key]
        code, text = KEYS.get(key, (ord(key[0].upper()), key))
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": sum(MODIFIERS[name] for name in held)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)
        self.settle()

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        try:
            self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        except RuntimeError as error:  # what was clicked led to another page
            if not any(word in str(error) for word in ("navigated", "context")):
                raise

    def centre(self, selector: str) -> tuple[float, float]:
        """Middle of an element, scrolled into sight."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def click(self, selector: str) -> None:
        """Click on an element with the pointer."""
        self.mouse(*self.centre(selector), click=True)

    def set(self, element: str, value: Any) -> None:
        """Give a control, named by an expression, a value as a person does."""
        change = "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));"
        self.run(f"(() => {{ const e = {element}; e.value = {json.dumps(value)}; {change} }})()")
        self.settle()

    def milliseconds(self, script: str, times: int = 10) -> float:
        """Mean time of the page's thread for an expression in `turn`; other processes do not count."""
        self.call("Performance.enable", timeDomain="threadTicks")
        before = self._busy_seconds()
        self.run(f"for (let turn = 0; turn < {times}; turn += 1) {{ {script}; }}")
        self.settle()
        spent = self._busy_seconds() - before
        self.call("Performance.disable")
        return 1000 * spent / times

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for end in (self.input, self.output):
            os.close(end)

    def _busy_seconds(self) -> float:
        metrics = {item["name"]: item["value"] for item in self.call("Performance.getMetrics")["metrics"]}
        return metrics["TaskDuration"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.output], [], [], SECONDS)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.output, 1 << 16)
            if not part:
                raise EOFError("the browser has ended")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        kind, values = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(values["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"])[:500])
        elif kind == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
