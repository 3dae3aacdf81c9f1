"""A real headless Chromium, driven over its DevTools protocol: one page, at any width, with what its console said."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""Path of a browser, or None where there is none."""

NOISY = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class View:
    """What one page looked like.

    Attributes:
        complaints: everything that reached the console.
        results: the values of the asked expressions, in order.
        screenshot: the whole page as PNG.
    """

    complaints: list[dict[str, Any]]
    results: list[Any]
    screenshot: bytes


@contextmanager
def browser() -> Iterator[str]:
    """Start a browser with a profile of its own and yield its DevTools address."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to be root inside its sandbox
        flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command = [CHROMIUM, *flags, *sandbox, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{_port(Path(profile, 'DevToolsActivePort'), process)}"
        finally:
            process.terminate()
            process.wait(TIMEOUT_SECONDS)


def view(address: str, path: str | Path, width: int, *expressions: str) -> View:
    """Open a local file `width` pixels wide and return its screenshot and what JavaScript expressions give."""
    return asyncio.run(_view(address, Path(path).resolve().as_uri(), width, expressions))


async def _view(address: str, url: str, width: int, expressions: tuple[str, ...]) -> View:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{address}/json/new?about:blank") as response:
            target = await response.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            await tab.call("Page.navigate", url=url)
            await tab.until("Page.loadEventFired")
            # Pictures below the first screen are decoded only when they are about to be seen.
            await tab.value(
                "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode()))).then(() => 1)"
            )
            results = [await tab.value(expression) for expression in expressions]
            image = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
            return View(
                [event for event in tab.events if event["method"] in NOISY], results, base64.b64decode(image["data"])
            )


class _Tab:
    """One page's end of the protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.num_calls = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.num_calls += 1
        await self.socket.send_json({"id": self.num_calls, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == self.num_calls:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        outcome = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"].get("value")

    async def until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message = await self.socket.receive_json(timeout=TIMEOUT_SECONDS)
        if "method" in message:
            self.events.append(message)
        return message


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended with {process.returncode}")
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("the browser gave no port")
