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
    """A run on the census, with risks and groups, whose epochs were both evaluated."""
    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "dtype=fp32", "num_warmup_steps=0", "epochs=2"]
    data = [
        "dataset=census",
        "dataset.arguments.wording=terse",
        "dataset.max_samples=48",
        "eval.limit=40",
        "eval.epochs=all",
    ]
    folder = tmp_path_factory.mktemp("page") / "run"
    cruijff_kit.train_then_eval(cruijff_kit.compose([*where, *data, "lr=1e-2", f"output_dir={folder}"]))
    return folder


def many(run: Path, to: Path, number: int) -> Path:
    """Runs made of the real one: settings, seeds, scores and losses of their own, names that need escaping; a failure."""
    result = json.loads((run / "result.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i in range(number):
        swept = {"lora.rank": 2 ** (1 + i % 5), "lr": [1e-4, 1e-3, 1e-2, 3e-2][i // 5 % 4], "seed": i // 20}
        score = round(20 * (1 + math.sin(i))) / 40
        own = json.loads(json.dumps(result)) | {
            "name": f"<i>run</i> $x_{{{i}",
            "config_hash": str(i),
            "swept": swept,
            "objective": score,
        }
        for cell in own["evaluation"]:
            cell["metrics"]["match"] = {"accuracy": score, "stderr": 0.07}
        if i == 2:
            error = {
                "type": "ValueError",
                "message": "<img src=http://127.0.0.1:9/x.png>",
                "phase": "train",
                "traceback": "",
            }
            own |= {"status": "failed", "objective": None, "evaluation": [], "error": error}
        folder = to / f"run{i}"
        folder.mkdir(parents=True)
        shutil.copy(run / "config.yaml", folder)
        (folder / "result.json").write_text(json.dumps(own))
        lines = [{k: v * (1 + i % 7) if k.endswith("loss") else v for k, v in step.items()} for step in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return to


async def loaded(page: Page, address: str) -> None:
    """Open an address, having asked to be told of every request and every complaint."""
    for domain in ("Network", "Runtime", "Log", "Page"):
        await page.call(f"{domain}.enable")
    page.events.clear()  # of the empty page
    await page.call("Page.navigate", url=address)
    while await page.value("document.readyState + location.protocol") != "completefile:":
        await asyncio.sleep(0.05)


def check_quiet(page: Page, address: str) -> None:
    """The page asked for itself and nothing else, and nobody complained."""
    asked = {e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"}
    assert {a for a in asked if not a.startswith("data:")} == {address}
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert not [e for e in page.events if e.get("method") in complaints]


async def check_look(page: Page, scheme: str, width: int, charts: int) -> None:
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    seen = await page.value(LOOKS)
    about = f"{scheme}, {width} px"
    assert seen["background"] == (DARK if scheme == "dark" else LIGHT), about
    assert seen["texts"] > 60 and seen["faint"] == [], f"{about}: {seen['faint']}"
    assert seen["over"] <= 0, f"{about}: the page is {seen['over']} px too wide"
    assert len(seen["charts"]) == charts
    for c in seen["charts"]:
        assert len(c["label"]) > 20 and c["width"] > 250 and c["height"] > 60 and c["drawn"] > 5, f"{about}: {c}"
    assert not seen["repeated"] and not seen["unresolved"] and not seen["headless"], about


@pytest.mark.parametrize("number", [1, 4, 200])
def test_the_page(chromium, run, tmp_path, number):
    folder = many(run, tmp_path / "sweep", number)
    report = write_report(folder)
    address = report.html.as_uri()

    async def story(page: Page) -> None:
        await loaded(page, address)
        for scheme in ("light", "dark"):
            for width in (1280, 400):
                await check_look(page, scheme, width, len(report.figures))
        if number > 1:
            sorted_once = await page.value(SORT.format(id="overview"))
            assert sorted_once["values"] == sorted(sorted_once["values"]) and sorted_once["sort"] == "ascending"
            assert len(sorted_once["values"]) == number - 1
            twice = await page.value(SORT.format(id="overview"))
            assert twice["values"] == sorted_once["values"][::-1] and twice["sort"] == "descending"
            assert "<img src=http://127.0.0.1:9/x.png>" in await page.value(
                "document.querySelector('#failures').parentElement.innerText"
            )
        check_quiet(page, address)

    look(chromium, "about:blank", tmp_path / "profile", story)


def test_what_is_looked_for_would_be_seen(chromium, run, tmp_path):
    """A page with faint text, a request, a complaint, an empty figure and too wide a line fails on each."""
    page_file = tmp_path / "bad.html"
    bad = '<p style="color:#ccc;width:3000px">faint</p><figure><svg></svg></figure><table></table>'
    bad += '<i id="a"></i><i id="a"></i><img src="missing.png">'
    page_file.write_text(f'<body style="background:#fff">{bad}')

    async def story(page: Page) -> None:
        await loaded(page, page_file.as_uri())
        seen = await page.value(LOOKS)
        assert seen["faint"] and seen["over"] > 0 and seen["charts"][0]["drawn"] == 0 and seen["headless"] == 1
        assert seen["repeated"] == ["a"]
        with pytest.raises(AssertionError):
            check_quiet(page, page_file.as_uri())

    look(chromium, "about:blank", tmp_path / "profile", story)
