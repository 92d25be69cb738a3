"""Drive a headless Chromium over the WebDriver protocol, with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import attrs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of a reference to an element, by the standard
_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--allow-file-access-from-files", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)
KEYS = {
    "Tab": "\ue004",
    "Enter": "\ue007",
    "Space": " ",
    "Home": "\ue011",
    "End": "\ue010",
    "Left": "\ue012",
    "Up": "\ue013",
    "Right": "\ue014",
    "Down": "\ue015",
    "PageDown": "\ue00f",
    "Shift": "\ue008",
}


@attrs.define(eq=False)
class Browser:
    """One window of Chromium; close it with ``close``."""

    _driver: subprocess.Popen[bytes]
    _address: str

    @classmethod
    def start(cls, folder: Path) -> Browser:
        """Start chromedriver and a window, with a profile in *folder*."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        driver = subprocess.Popen(
            [str(DRIVER), f"--port={port}", "--silent"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {"binary": CHROMIUM, "args": [*_QUIET, f"--user-data-dir={folder}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        browser = cls(driver, f"http://127.0.0.1:{port}")
        for attempt in range(100):
            try:
                found = browser.call("/session", {"capabilities": {"alwaysMatch": asked}})
                break
            except urllib.error.URLError:
                if attempt == 99 or driver.poll() is not None:
                    driver.kill()
                    raise
                time.sleep(0.1)
        browser._address += f"/session/{found['sessionId']}"
        return browser

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Send one command of the protocol and return its value."""
        data = None if method != "POST" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def close(self) -> None:
        try:
            self.call("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait(120)

    def open(self, page: Path, hash: str = "", size: tuple[int, int] = (1280, 900)) -> None:
        """Open the file *page* in a window of *size*; anything that was logged before is forgotten."""
        self.resize(*size)
        self.call("/url", {"url": "about:blank"})
        self.requests()
        self.errors()
        self.call("/url", {"url": page.as_uri() + hash})

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run *script* as the body of a function, and return what it returns."""
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def dark(self, on: bool) -> None:
        """Let the page see a system that prefers dark colours, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def click(self, selector: str) -> None:
        """Click the element, as a user does: it is scrolled into view, and must not be covered."""
        found = self.call("/element", {"using": "css selector", "value": selector})[_ELEMENT]
        self.call(f"/element/{found}/click")

    def click_at(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window and click there."""
        moves = [
            {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves}
        self.call("/actions", {"actions": [pointer]})

    def press(self, *names: str) -> None:
        """Press keys, one after the other: names of ``KEYS``, or characters."""
        strokes = [{"type": kind, "value": KEYS.get(name, name)} for name in names for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def errors(self) -> list[str]:
        """Return what the page wrote to the console since the last call: errors of the script, refused requests."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.call("/se/log", {"type": "performance"})]
        sent = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["params"]["request"]["url"] for one in sent]

    def picture(self, path: Path, whole: bool = True) -> None:
        """Write a screenshot as PNG, of the *whole* page or of what the window shows."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
