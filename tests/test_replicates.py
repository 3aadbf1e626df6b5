"""Seeds as replicates: grouped by all else, with the t interval that scipy computes."""

import json

import numpy as np
import pytest
from scipy.stats import t

from cruijff_kit import table
from cruijff_kit.replicates import replicates, spread
from cruijff_kit.result import Evaluation, RunResult, to_json
from cruijff_kit.summary import write_summary


def run(rank: int, seed: int, accuracy: float, status: str = "done") -> RunResult:
    entry = Evaluation("count", 0, 12, {"match": {"accuracy": accuracy, "stderr": 0.03}}, "gone.eval", 1.0)
    return RunResult(
        f"rank={rank},seed={seed}", status, "counting", "tiny", {"lora.rank": rank, "seed": seed},
        {"lora.rank": rank, "lr": 1e-3, "batch_size": 4, "epochs": 1, "seed": seed}, f"{rank}{seed}",
        objective_name="accuracy", objective=accuracy, training={"loss": accuracy / 10, "validation_loss": None},
        seconds={"total": 1.0}, evaluation=[entry],
    )  # fmt: skip


RUNS = [run(4, 1, 0.8), run(4, 2, 0.9), run(8, 1, 0.7), run(4, 3, 0.85), run(8, 2, 0.1, "failed"), run(16, 1, 0.5)]


def test_spread_is_students():
    values = [0.8, 0.9, 0.85]
    found = spread(values, [0.3, 0.4])
    low, high = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / np.sqrt(3))
    assert (found.mean, found.low, found.high) == pytest.approx((0.85, low, high))
    assert found.item_error == pytest.approx(np.sqrt(0.125)) and found.runs == 3
    assert spread([1.0]).low is None


def test_runs_that_differ_in_the_seed_alone():
    (group,) = replicates(RUNS)
    assert (group.name, group.seeds) == ("rank=4", [1, 2, 3]) and group.swept == {"lora.rank": 4}
    assert group.runs == ["rank=4,seed=1", "rank=4,seed=2", "rank=4,seed=3"]
    assert group.metrics["count/match/accuracy"].mean == pytest.approx(0.85)
    assert group.metrics["count/match/accuracy"].item_error == pytest.approx(0.03)
    assert set(group.metrics) == {"loss", "count/match/accuracy"}
    assert replicates(RUNS[2:3]) == replicates([]) == []


def test_in_the_table(tmp_path, capsys):
    for r in RUNS:
        (tmp_path / r.name).mkdir()
        (tmp_path / r.name / "result.json").write_text(to_json(r))
    assert table.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "match accuracy" in line and "[" in line)
    assert (
        line.split() == ["match", "accuracy", "0.850", "[0.726,", "0.974]", "±0.030"] and "rank=4      1, 2, 3" in shown
    )
    assert table.main([str(tmp_path), "--json"]) == 0
    found = {r["name"]: r["replicates"] for r in json.loads(capsys.readouterr().out)}
    assert found["rank=4,seed=2"]["seeds"] == [1, 2, 3] and found["rank=8,seed=1"] is None
    write_summary(tmp_path)
    summary = (tmp_path / "experiment_summary.md").read_text()
    assert "| rank=4 | 1, 2, 3 | loss | 0.085 | [0.073, 0.097] |  |" in summary
