"""A run's logs open in `inspect view`, looked at with a real Chromium, driven over its DevTools protocol."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PATIENCE, Page, ended, look

import cruijff_kit


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run on six rows of the census."""
    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0"]
    data = ["dataset=census", "dataset.arguments.wording=terse", "dataset.max_samples=32", "eval.limit=6"]
    folder = tmp_path_factory.mktemp("view") / "run"
    return cruijff_kit.train_then_eval(cruijff_kit.compose([*where, *data, "lr=1e-2", f"output_dir={folder}"]))


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


def test_a_runs_logs_open_in_inspect_view(chromium, view, run, tmp_path):
    """The list of logs, a log with its accuracy, and one of its samples, as a user clicks through them."""
    (entry,) = run.evaluation
    model = re.escape(f"cruijff_kit/{run.model}")
    accuracy = f"{entry.metrics['match']['accuracy']:.3f}".rstrip("0")

    async def script(page: Page) -> None:
        await page.showing(r"\brisk\b", model, r"(?m)^2 (rows|items)$")  # the run's log and the base model's
        own = Path(entry.log).name
        await page.value(f"document.querySelector('a[href*=\"{own}\"]').click()")
        text = await page.showing(own, r"\brisk\b", model, r"AGE:\d+", rf"match\s+{re.escape(accuracy)}")
        asked = re.search(r"AGE:.*", text)[0]
        await page.click(asked)
        text = await page.showing(r"Sample 0 \(Epoch 1\)", r"TRANSCRIPT", r"ASSISTANT", re.escape(asked))
        assert re.search(r"TARGET\s+[01]\s", text) and re.search(r"RISK_SCORER\s+[CIN]\s", text)

    look(chromium, view, tmp_path / "profile", script)
