"""The main job as a user starts it: the four-run sweep of a real model, from one line."""

import json
import subprocess
import sys

import pytest
from exactness import assert_peft_agrees

import cruijff_kit
from cruijff_kit.models.adapter import load_adapter
from cruijff_kit.records.result import read_result


@pytest.mark.real_model
def test_the_main_job(smollm2, environment, set_up_recipe, tmp_path):
    """The model learns the task, the table names the best run, all is there as data, and peft loads an adapter."""
    done = subprocess.run(
        [sys.executable, "-m", "cruijff_kit.train", "-m", "lora.rank=8,16", "lr=1e-3,5e-4"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "multirun" / "capitalization").iterdir()

    results = [read_result(p) for p in folder.glob("*/result.json")]
    assert sorted(r.name for r in results) == [
        "rank=16,lr=0.0005", "rank=16,lr=0.001", "rank=8,lr=0.0005", "rank=8,lr=0.001",
    ]  # fmt: skip
    for r in results:
        assert r.status == "done" and r.evaluation[0].samples == r.baseline[0].samples == 100
        assert r.baseline[0].metrics["match"]["accuracy"] < 0.10
        assert r.training["validation_loss"] < 0.5
    assert max(r.evaluation[0].metrics["match"]["accuracy"] for r in results) >= 0.80

    frame = cruijff_kit.read_sweep(folder)
    best = frame.loc[frame["best"]]
    leader = frame.loc[frame["validation_loss"].idxmin()]
    assert leader["Run Name"] in {*best["Run Name"]} and all(f"* {name}" in done.stdout for name in best["Run Name"])
    assert f"* best by validation_loss on the validation split: {leader['Run Name']}" in done.stdout
    for column in ("lora.rank", "lr", "loss", "validation loss", "accuracy before", "accuracy after", "seconds"):
        assert column in done.stdout

    for run in folder.glob("rank=*"):
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [s["step"] for s in steps if "loss" in s] == list(range(1, 51))
        assert (run / "epoch_0" / "adapter_config.json").exists() and len(list((run / "eval").rglob("*.eval"))) == 2

    adapter = folder / "rank=8,lr=0.001" / "epoch_0"
    recipe = set_up_recipe(f"model.path={smollm2}", "dtype=fp32", "lora.rank=8", f"output_dir={tmp_path / 'recipe'}")
    load_adapter(recipe.model, adapter)
    assert_peft_agrees(recipe, adapter)
