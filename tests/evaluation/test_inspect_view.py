"""A run's logs open in `inspect view`, looked at with a real Chromium, driven over its DevTools protocol."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

import cruijff_kit

PATIENCE = 60  # seconds; a page is there in about one
ROW = "[...document.querySelectorAll('[role=gridcell]')].find(e => e.innerText.trim() === {text})"


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's command. Fails, with the line to type, when there is none."""
    check = ["sh", str(Path(__file__).parents[1] / "browser.sh"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True)
    if found.returncode:
        pytest.fail(found.stderr.strip(), pytrace=False)
    return found.stdout.strip()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run on six rows of the census."""
    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0"]
    data = ["dataset=census", "dataset.arguments.wording=terse", "dataset.max_samples=32", "eval.limit=6"]
    folder = tmp_path_factory.mktemp("view") / "run"
    return cruijff_kit.train_then_eval(cruijff_kit.compose([*where, *data, "lr=1e-2", f"output_dir={folder}"]))


def ended(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def view(run, environment, tmp_path) -> Iterator[str]:
    """The address of `inspect view` on the run's logs, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = str(Path(run.paths["run"]) / "eval")
    command = [sys.executable, "-m", "inspect_ai", "view", "start", "--log-dir", logs, "--port", str(port)]
    with (tmp_path / "view.txt").open("w") as said:
        server = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                text = (tmp_path / "view.txt").read_text()
                assert server.poll() is None and time.monotonic() < until, f"inspect view does not answer: {text}"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        ended(server)


class Page:
    """A page of the browser: what stands on it, and clicks."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._asked = socket, 0

    async def value(self, script: str) -> str:
        """What a line of JavaScript gives."""
        self._asked += 1
        asked = {"expression": script, "returnByValue": True}
        await self._socket.send_json({"id": self._asked, "method": "Runtime.evaluate", "params": asked})
        while (answer := await self._socket.receive_json()).get("id") != self._asked:
            pass
        return answer["result"]["result"].get("value")

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


def look(chromium: str, address: str, folder: Path, story: Callable) -> None:
    """Open an address in a browser of its own and call `story` with the page."""
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
                await story(Page(socket))

    try:
        asyncio.run(visit())
    finally:
        ended(browser)


def test_a_runs_logs_open_in_inspect_view(chromium, view, run, tmp_path):
    """The list of logs, a log with its accuracy, and one of its samples, as a user clicks through them."""
    (entry,) = run.evaluation
    model = re.escape(f"cruijff_kit/{run.model}")
    accuracy = f"{entry.metrics['match']['accuracy']:.3f}".rstrip("0")

    async def story(page: Page) -> None:
        await page.showing(r"\brisk\b", model, r"(?m)^2 (rows|items)$")  # the run's log and the untrained model's
        own = Path(entry.log).name
        await page.value(f"document.querySelector('a[href*=\"{own}\"]').click()")
        text = await page.showing(own, r"\brisk\b", model, r"AGE:\d+", rf"match\s+{re.escape(accuracy)}")
        asked = re.search(r"AGE:.*", text)[0]
        await page.click(asked)
        text = await page.showing(r"Sample 0 \(Epoch 1\)", r"TRANSCRIPT", r"ASSISTANT", re.escape(asked))
        assert re.search(r"TARGET\s+[01]\s", text) and re.search(r"RISK_SCORER\s+[CIN]\s", text)

    look(chromium, view, tmp_path / "profile", story)
