"""A real browser for the pages that Fathom writes: what it shows, what it complains about, what it asks the network
for, and what keys and the pointer do."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60


class Page:
    """One page; `complaints` are errors and warnings of its console, `asked` the addresses it has asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []
        self.asked: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            params = said.get("params", {})
            match said.get("method"):
                case None:
                    self._answers.pop(said["id"]).set_result(said)
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Network.requestWillBeSent":
                    self.asked.append(params["request"]["url"])
                case "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled":
                    self.complaints.append(json.dumps(params)[:500])

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, SECONDS)
        assert "error" not in said, said
        return said["result"]

    async def open(self, place: Path | str, width: int, dark: bool = False, height: int = 900) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded.clear()
        await self.call("Page.navigate", url=place if isinstance(place, str) else place.resolve().as_uri())
        await asyncio.wait_for(self._loaded.wait(), SECONDS)
        await self.says("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    async def says(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = SECONDS) -> Any:
        """The value of a JavaScript expression once it is something."""
        deadline = time.monotonic() + seconds
        while not (value := await self.says(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value!r}"
            await asyncio.sleep(0.05)
        return value

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def pointer(self, kind: str, x: float, y: float, held: bool = False) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": 1} if held else {}
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            *(
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
            ),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
            "about:blank",
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            address = ""
            while not (found := re.search(r"ws://(\S+?)/", address)):
                address = (await asyncio.wait_for(process.stderr.readline(), SECONDS)).decode()
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{found[1]}/json/list") as answer:
                    target = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = asyncio.create_task(page.listen())
                    yield page
                    listening.cancel()
        finally:
            process.kill()
            await process.wait()


def look(act: Callable[[Page], Awaitable[None]]) -> None:
    """Does something with a page of a new browser."""

    async def alone() -> None:
        async with browser() as page:
            await act(page)

    asyncio.run(alone())
