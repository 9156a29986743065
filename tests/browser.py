"""A real browser without a window, driven as the W3C's WebDriver says: JSON over HTTP to chromedriver."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which the protocol hands elements over."""
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    """A session of a browser. Elements are named by CSS selectors."""

    def __init__(self, address: str, program: str) -> None:
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this computer
        options = {"binary": program, "args": list(_ARGUMENTS)}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._address = f"{address}/session"
        self._address += "/" + self._call("POST", "", capabilities=wanted)["sessionId"]

    def _call(self, method: str, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self._address + path, json.dumps(body).encode() if method == "POST" else None, method=method)
        with self._opener.open(request, timeout=120) as response:
            return json.load(response)["value"]

    def open(self, address: str) -> None:
        """Load a page, and wait until it is loaded."""
        self._call("POST", "/url", url="about:blank")  # an address that differs in its fragment alone loads nothing
        self._call("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a JavaScript function's body and return its result."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of Chrome's own protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def click(self, selector: str) -> None:
        """Bring an element into view and click it as a pointer does: nothing may cover it."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        found = self._call("POST", "/element", using="css selector", value=selector)
        self._call("POST", f"/element/{found[_ELEMENT]}/click")

    def type(self, keys: str) -> None:
        """Press keys in the element that has the focus."""
        active = self._call("GET", "/element/active")
        self._call("POST", f"/element/{active[_ELEMENT]}/value", text=keys)

    def messages(self) -> list[str]:
        """Return what the console has shown since the last time."""
        return [entry["message"] for entry in self._call("POST", "/se/log", type="browser")]

    def quit(self) -> None:
        """Close the browser."""
        self._call("DELETE", "")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser for a test, or skip the test where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            started = next(line for line in process.stdout if "started successfully on port" in line)
            session = Browser(f"http://127.0.0.1:{started.rstrip().rstrip('.').rpartition(' ')[2]}", program)
            try:
                yield session
            finally:
                session.quit()
        finally:
            process.terminate()
