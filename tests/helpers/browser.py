"""A real Chromium for tests, driven over its DevTools protocol."""

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 60  # seconds; a page is there in about one
ROW = "[...document.querySelectorAll('[role=gridcell]')].find(e => e.innerText.trim() === {text})"


def ended(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Page:
    """A page of the browser: what stands on it, and clicks."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._asked = socket, 0
        self.events: list[dict[str, Any]] = []  # events of the browser, once a domain is enabled

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method of the DevTools protocol."""
        self._asked += 1
        await self._socket.send_json({"id": self._asked, "method": method, "params": params})
        while (answer := await self._socket.receive_json()).get("id") != self._asked:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    async def value(self, script: str) -> Any:
        """What a line of JavaScript gives."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def showing(self, *patterns: str) -> str:
        """The page's text as it is rendered, once each of the patterns stands in it."""
        until = time.monotonic() + PATIENCE
        while True:
            text = await self.value("document.body ? document.body.innerText : ''") or ""
            lacking = [p for p in patterns if not re.search(p, text)]
            if not lacking:
                return text
            assert time.monotonic() < until, f"the page does not show {lacking}; it shows: {text[:2000]}"
            await asyncio.sleep(0.1)

    async def click(self, text: str) -> None:
        """Click on the cell of a table that holds this text."""
        cell = ROW.format(text=json.dumps(text))
        assert await self.value(f"(() => {{ const e = {cell}; e && e.click(); return String(!!e); }})()") == "true", (
            text
        )


def look(chromium: str, address: str, folder: Path, script: Callable) -> None:
    """Open an address in a browser of its own and call `script` with the page."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--window-size=1600,1200", f"--user-data-dir={folder}", "--remote-debugging-port=0"]  # fmt: skip
    said = folder.with_name("browser.txt")
    with said.open("w") as errors:
        browser = subprocess.Popen([chromium, *options, address], stdout=errors, stderr=subprocess.STDOUT)

    async def visit() -> None:
        until = time.monotonic() + PATIENCE
        while not (listening := re.search(r"DevTools listening on ws://([^/]+)/", said.read_text())):
            assert browser.poll() is None and time.monotonic() < until, f"{chromium} does not start: {said.read_text()}"
            await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as session:
            pages: list[dict] = []
            while not pages:
                async with session.get(f"http://{listening[1]}/json/list") as answer:
                    pages = [p for p in await answer.json(content_type=None) if p["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                await script(Page(socket))

    try:
        asyncio.run(visit())
    finally:
        ended(browser)
