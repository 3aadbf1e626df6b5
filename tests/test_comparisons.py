"""Comparisons item by item: against scipy and brute force, corrected, from logs to the table."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import match
from scipy.stats import ttest_1samp

from cruijff_kit import table
from cruijff_kit.comparisons import compare_pairs, compare_runs, holm, items_of
from cruijff_kit.evaluation.scorers import continuous_scorer
from cruijff_kit.result import Evaluation, RunResult, to_json


def pairs(both: int, gained: int, lost: int, neither: int) -> list[tuple[float, float]]:
    return [(1.0, 1.0)] * both + [(1.0, 0.0)] * gained + [(0.0, 1.0)] * lost + [(0.0, 0.0)] * neither


def test_mcnemar_exactly():
    """p by counting all ways in which the items that changed could have; the interval by Agresti & Min's formula."""
    difference, low, high, p, method = compare_pairs(pairs(40, 9, 2, 49))
    ways = [sum(flips) for flips in itertools.product((0, 1), repeat=11)]
    assert p == pytest.approx(sum(abs(w - 5.5) >= 3.5 for w in ways) / 2**11)
    assert method == "McNemar, exact" and difference == pytest.approx(0.07)
    reach = 1.959964 * math.sqrt(12 - 49 / 102) / 102
    assert (low, high) == pytest.approx((7 / 102 - reach, 7 / 102 + reach), abs=1e-6)
    assert compare_pairs(pairs(3, 0, 0, 2))[0:4:3] == (0, 1.0)


def test_mcnemar_holds_its_level_and_the_interval_covers():
    draw = np.random.default_rng(0)
    rejected = covered = 0
    for _ in range(400):
        kind = draw.choice(4, 80, p=[0.5, 0.2, 0.1, 0.2])
        _, low, high, *_ = compare_pairs(pairs(*(int((kind == k).sum()) for k in range(4))))
        covered += low <= 0.1 <= high
        even = draw.choice(4, 80, p=[0.5, 0.15, 0.15, 0.2])
        rejected += compare_pairs(pairs(*(int((even == k).sum()) for k in range(4))))[3] < 0.05
    assert covered / 400 > 0.93 and rejected / 400 < 0.07


def test_other_scores_are_resampled():
    draw = np.random.default_rng(1)
    own, other = draw.normal(1, 1, 200), draw.normal(0.8, 1, 200)
    both = list(zip(own, other, strict=True))
    found = compare_pairs(both)
    expected = ttest_1samp(own - other, 0)
    assert found == compare_pairs(both) and found[4] == "bootstrap over items"
    assert found[0] == pytest.approx((own - other).mean()) and found[3] == pytest.approx(expected.pvalue, abs=0.03)
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval()), abs=0.03)
    many = compare_pairs(both * 51)
    assert many[4] == "paired t" and many[0] == pytest.approx(found[0])
    assert compare_pairs([(0.5, 0.5)] * 5)[3] == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A function: the answers of a model to 1, 2, 3, ... -> the .eval file."""

    def made(answers: list[str], scorer) -> str:
        samples = [Sample(id=i, input="?", target=str(i)) for i in range(1, len(answers) + 1)]
        outputs = [ModelOutput.from_content("mockllm/model", a) for a in answers]
        for output in outputs:
            output.usage = ModelUsage()
        model = get_model("mockllm/model", custom_outputs=outputs)
        task = Task(dataset=MemoryDataset(samples), scorer=scorer, name="count")
        folder = str(tmp_path_factory.mktemp("logs"))
        return eval(task, model=model, log_dir=folder, display="none", max_connections=1)[0].location

    return made


def result(name: str, seed: int, own: str, untrained: str, **metrics: float) -> RunResult:
    def entry(log: str, epoch: int | None) -> Evaluation:
        return Evaluation("count", epoch, 12, {"match": metrics}, log, 1.0)

    return RunResult(
        name, "done", "counting", "tiny", {"lora.rank": 4 if seed < 3 else 8, "seed": seed % 3},
        {"lora.rank": 4 if seed < 3 else 8, "lr": 1e-3, "batch_size": 4, "epochs": 1, "seed": seed % 3}, f"{seed}",
        started=f"2026-01-01T00:00:0{seed}", objective_name="accuracy", objective=metrics["accuracy"],
        training={"loss": 0.1 * (seed + 1)}, seconds={"total": 1.0},
        baseline=[entry(untrained, None)], evaluation=[entry(own, 0)], paths={},
    )  # fmt: skip


@pytest.fixture
def sweep(log, tmp_path):
    """Two runs and the untrained model on twelve items: none, ten and all right."""
    right = [str(i) for i in range(1, 13)]
    untrained = log(["x"] * 12, match())
    runs = [
        result("a", 0, log(["x", "x", *right[2:]], match()), untrained, accuracy=10 / 12, stderr=0.1),
        result("b", 3, log(right, match()), untrained, accuracy=1.0, stderr=0.0),
    ]
    for run in runs:
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "result.json").write_text(to_json(run))
    return tmp_path


def test_from_logs_to_the_table(sweep, capsys):
    r = table.read_results(sweep)
    best = table.best_run(r)
    assert best is r[1]
    of_a, of_b = compare_runs(r, best)
    assert [(c.against, c.items, c.difference) for c in of_a] == [
        ("untrained", 12, pytest.approx(10 / 12)), ("best", 12, pytest.approx(-2 / 12))
    ]  # fmt: skip
    assert [c.p for c in of_a] == pytest.approx([2 / 2**10, 0.5]) and [c.against for c in of_b] == ["untrained"]
    assert [of_a[0].p_holm, of_b[0].p_holm] == pytest.approx([2 / 2**10, 4 / 2**12])
    assert table.main([str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^a    match   \+0.83 \[.*\] p=0.002  -0.17 \[.*\] p=0.500$", shown, flags=re.MULTILINE)
    assert re.search(r"^\* b  match   \+1.00 \[.*\] p<0.001 *$", shown, flags=re.MULTILINE)
    assert table.main([str(sweep), "--json"]) == 0
    (first, _) = json.loads(capsys.readouterr().out)
    assert first["name"] == "a" and first["comparisons"][0]["p_holm"] == pytest.approx(2 / 2**10)
    frame = table.read_sweep(sweep)
    assert frame["versus best count/match/difference"].tolist()[0] == pytest.approx(-2 / 12)
    assert frame["versus best count/match/difference"].isna().tolist() == [False, True]


def test_of_several_epochs_the_last_counts(sweep):
    a, b = table.read_results(sweep)
    a.evaluation.insert(0, b.evaluation[0])
    assert [c.difference for c in compare_runs([a], None)[0]] == [pytest.approx(10 / 12)]


def test_read_once_and_gone_later(sweep, cache, capsys):
    run = table.read_results(sweep)[0]
    path = Path(run.evaluation[0].log)
    assert items_of(str(path))["match"] == {str(i): float(i > 2) for i in range(1, 13)}
    copy = sweep / "copy.eval"
    copy.write_bytes(path.read_bytes())
    count = len(list((cache / "items").iterdir()))
    items_of(str(copy))
    assert len(list((cache / "items").iterdir())) == count, "a copy is the same log"
    path.unlink()
    copy.write_text("no log")
    assert items_of(str(path)) == items_of(str(copy)) == {}
    assert table.main([str(sweep)]) == 0 and "10" in capsys.readouterr().out


def test_unscored_items_are_left_out(log):
    found = items_of(log(["1", "none", "5"], continuous_scorer()))
    assert found == {"continuous_scorer": {"1": 0.0, "3": 2.0}}
