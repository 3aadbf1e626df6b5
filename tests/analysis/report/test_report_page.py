"""The report's page in a real Chromium: 1, 4 and 200 runs, light and dark, wide and narrow, without a network."""

import asyncio
import json
import math
import shutil
from pathlib import Path

import pytest
from browser import Page, look

import cruijff_kit
from cruijff_kit.analysis.report.build import write_report

LOOKS = (Path(__file__).parents[2] / "helpers" / "looks.js").read_text()
DARK, LIGHT = "rgb(20, 23, 28)", "rgb(255, 255, 255)"
SORT = """(() => {{
  const table = document.querySelector('#{id}').parentElement.querySelector('table');
  const heads = [...table.tHead.rows[0].cells], column = heads.findIndex((h) => h.innerText.trim().startsWith('value'));
  heads[column].querySelector('button').click();
  const values = [...table.tBodies[0].rows].map((r) => r.cells[column].innerText).filter((t) => t).map(Number);
  return {{ values, sort: heads[column].getAttribute('aria-sort') }};
}})()"""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Train a run on the census, with risks and groups, and evaluate both epochs."""
    overrides = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0", "epochs=2"]
    data = [
        "dataset=census",
        "dataset.arguments.wording=terse",
        "dataset.max_samples=48",
        "eval.limit=40",
        "eval.epochs=all",
    ]
    folder = tmp_path_factory.mktemp("page") / "run"
    cruijff_kit.train_then_eval(cruijff_kit.compose([*overrides, *data, "lr=1e-2", f"output_dir={folder}"]))
    return folder


def make_runs(run: Path, target: Path, number: int) -> Path:
    """Copy the run with other settings, seeds, scores and losses, names that need escaping, and a failure."""
    result = json.loads((run / "result.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i in range(number):
        swept = {"lora.rank": 2 ** (1 + i % 5), "lr": [1e-4, 1e-3, 1e-2, 3e-2][i // 5 % 4], "seed": i // 20}
        score = round(20 * (1 + math.sin(i))) / 40
        changed = json.loads(json.dumps(result)) | {
            "name": f"<i>run</i> $x_{{{i}",
            "config_hash": str(i),
            "swept": swept,
            "objective": score,
        }
        for cell in changed["evaluation"]:
            cell["metrics"]["match"] = {"accuracy": score, "stderr": 0.07}
        if i == 2:
            error = {
                "type": "ValueError",
                "message": "<img src=http://127.0.0.1:9/x.png>",
                "phase": "train",
                "traceback": "",
            }
            changed |= {"status": "failed", "objective": None, "evaluation": [], "error": error}
        folder = target / f"run{i}"
        folder.mkdir(parents=True)
        shutil.copy(run / "config.yaml", folder)
        (folder / "result.json").write_text(json.dumps(changed))
        lines = [{k: v * (1 + i % 7) if k.endswith("loss") else v for k, v in step.items()} for step in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


async def open_page(page: Page, address: str) -> None:
    """Open an address, with events of every request and every error enabled."""
    for domain in ("Network", "Runtime", "Log", "Page"):
        await page.call(f"{domain}.enable")
    page.events.clear()  # events of the empty page
    await page.call("Page.navigate", url=address)
    while await page.value("document.readyState + location.protocol") != "completefile:":
        await asyncio.sleep(0.05)


def check_quiet(page: Page, address: str) -> None:
    """Check that the page requests only itself and logs no message."""
    addresses = {e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"}
    assert {a for a in addresses if not a.startswith("data:")} == {address}
    complaint_methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert not [e for e in page.events if e.get("method") in complaint_methods]


async def check_look(page: Page, scheme: str, width: int, charts: int) -> None:
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    measures = await page.value(LOOKS)
    context = f"{scheme}, {width} px"
    assert measures["background"] == (DARK if scheme == "dark" else LIGHT), context
    assert measures["texts"] > 60 and measures["faint"] == [], f"{context}: {measures['faint']}"
    assert measures["over"] <= 0, f"{context}: the page is {measures['over']} px too wide"
    assert len(measures["charts"]) == charts
    for c in measures["charts"]:
        assert len(c["label"]) > 20 and c["width"] > 250 and c["height"] > 60 and c["drawn"] > 5, f"{context}: {c}"
    assert not measures["repeated"] and not measures["unresolved"] and not measures["headless"], context


@pytest.mark.parametrize("number", [1, 4, 200])
def test_the_page(chromium, run, tmp_path, number):
    folder = make_runs(run, tmp_path / "sweep", number)
    report = write_report(folder)
    address = report.html.as_uri()

    async def check(page: Page) -> None:
        await open_page(page, address)
        for scheme in ("light", "dark"):
            for width in (1280, 400):
                await check_look(page, scheme, width, len(report.figures))
        if number > 1:
            sorted_once = await page.value(SORT.format(id="overview"))
            assert sorted_once["values"] == sorted(sorted_once["values"]) and sorted_once["sort"] == "ascending"
            assert len(sorted_once["values"]) == number - 1
            sorted_twice = await page.value(SORT.format(id="overview"))
            assert sorted_twice["values"] == sorted_once["values"][::-1] and sorted_twice["sort"] == "descending"
            assert "<img src=http://127.0.0.1:9/x.png>" in await page.value(
                "document.querySelector('#failures').parentElement.innerText"
            )
        check_quiet(page, address)

    look(chromium, "about:blank", tmp_path / "profile", check)


def test_checks_detect_defects(chromium, run, tmp_path):
    """A page with faint text, a request, an error, an empty figure and too wide a line fails each check."""
    page_file = tmp_path / "bad.html"
    html = '<p style="color:#ccc;width:3000px">faint</p><figure><svg></svg></figure><table></table>'
    html += '<i id="a"></i><i id="a"></i><img src="missing.png">'
    page_file.write_text(f'<body style="background:#fff">{html}')

    async def check(page: Page) -> None:
        await open_page(page, page_file.as_uri())
        measures = await page.value(LOOKS)
        assert (
            measures["faint"]
            and measures["over"] > 0
            and measures["charts"][0]["drawn"] == 0
            and measures["headless"] == 1
        )
        assert measures["repeated"] == ["a"]
        with pytest.raises(AssertionError):
            check_quiet(page, page_file.as_uri())

    look(chromium, "about:blank", tmp_path / "profile", check)
