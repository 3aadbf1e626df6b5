"""Groups: numbers by scipy and by hand, what is flagged, from a CSV and from a log, and the command's files."""

import csv
import json

import numpy as np
import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from scipy.stats import f_oneway
from sklearn.metrics import roc_auc_score

from cruijff_kit.errors import UserError
from cruijff_kit.evaluation.scorers import numeric_risk_scorer
from cruijff_kit.heterogeneity import PICTURE, REPORT, Row, heterogeneity, main, read_rows
from cruijff_kit.result import Evaluation, RunResult, to_json

HEADER = ["INPUT", "TRUE_LABEL", "PREDICTION", "P(TRUE LABEL)", "GROUP"]


def drawn(name: str, n: int, noise: float, seed: int) -> list[Row]:
    """A group whose risks follow the label with some noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, n)
    risks = np.clip(labels * 0.6 + 0.2 + draw.normal(0, noise, n), 0, 1)
    return [Row(name, float((r >= 0.5) == y), bool(y), float(r)) for y, r in zip(labels, risks, strict=True)]


ALIKE = [row for i, name in enumerate("abcde") for row in drawn(name, 80, 0.2, i)]
ODD = [row for i, name in enumerate("abcde") for row in drawn(name, 80, 3.0 if name == "e" else 0.2, i)]


def test_numbers_are_those_of_scipy_and_scikit_learn():
    report = heterogeneity(ODD)
    groups = {n: [r for r in ODD if r.group == n] for n in "abcde"}
    expected = f_oneway(*([r.correct for r in g] for g in groups.values()))
    assert (report.f, report.p) == pytest.approx((expected.statistic, expected.pvalue))
    aucs = [roc_auc_score([r.positive for r in g], [r.risk for r in g]) for g in groups.values()]
    assert [g.auc for g in report.groups] == pytest.approx(aucs)
    assert (report.auc_std, report.auc_range) == pytest.approx((np.std(aucs), max(aucs) - min(aucs)))
    accuracies = [np.mean([r.correct for r in g]) for g in groups.values()]
    assert report.groups[4].z == pytest.approx((accuracies[4] - np.mean(accuracies)) / np.std(accuracies))
    assert report.accuracy == np.mean([r.correct for r in ODD]) and report.samples == 400


def test_what_is_flagged():
    report = heterogeneity(ODD)
    assert report.p < 0.05 and report.groups[4].outlier and not any(g.outlier for g in report.groups[:4])
    assert any(f.startswith("accuracy differs") for f in report.flags) and any(
        f.startswith("e: z of") for f in report.flags
    )
    good, bad = drawn("a", 60, 0.1, 0), [Row("b", r.correct, r.positive, 1 - r.risk) for r in drawn("b", 60, 0.1, 1)]
    flags = " ".join(heterogeneity(good + bad).flags)
    assert "standard deviation 0.500 > 0.1" in flags and "range 1.000 > 0.3" in flags and "b: AUC 0.000 < 0.6" in flags
    same = heterogeneity([Row(n, r.correct, r.positive, r.risk) for n in "ab" for r in drawn("a", 60, 0.2, 0)])
    assert same.flags == [] and same.groups[0].z is None


def test_what_is_not_defined():
    report = heterogeneity([Row("a", 1, True, 0.9), Row("a", 1, True, 0.8), Row("b", 1), Row("b", 1)])
    assert (report.f, report.p, report.auc, report.auc_std) == (None, None, None, None) and report.flags == []
    parted = heterogeneity([Row("a", 1.0)] * 3 + [Row("b", 0.0)] * 3)
    assert parted.f is None and parted.p == 0 and parted.flags
    with pytest.raises(UserError, match="has 1 groups"):
        heterogeneity([Row("a", 1)])


@pytest.fixture
def table(tmp_path):
    """ODD as v1's CSV: P(TRUE LABEL), not P(label = 1)."""
    path = tmp_path / "predictions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for r in ODD:
            label = int(r.positive)
            shown = label if r.correct else "dunno"
            writer.writerow(["?", label, shown, r.risk if label else 1 - r.risk, r.group])
    return path


def test_the_command_on_a_csv(table, tmp_path, capsys):
    assert main([str(table)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy differs between groups" in shown and f"written to {tmp_path / REPORT}" in shown
    report = json.loads((tmp_path / REPORT).read_text())
    expected = heterogeneity(ODD)
    assert [g["auc"] for g in report["groups"]] == pytest.approx([g.auc for g in expected.groups])
    assert report["p"] == pytest.approx(expected.p) and report["source"] == str(table)
    assert (tmp_path / PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main([str(table), "--to", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 400 and (tmp_path / "new" / PICTURE).exists()


def test_a_csv_that_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "x.csv"

    def refused(text: str, *options: str) -> str:
        path.write_text(text)
        assert main([str(path), *options]) == 2
        return capsys.readouterr().err

    head = ",".join(HEADER)
    assert "has no column GROUP; it has INPUT" in refused("INPUT,TRUE_LABEL,PREDICTION,P(TRUE LABEL)\n")
    assert "has no column SEX" in refused(f"{head}\n", "--group", "SEX")
    assert "line 2: TRUE_LABEL 'yes' must be 0 or 1" in refused(f"{head}\n?,yes,1,0.5,a\n")
    assert "line 2: P(TRUE LABEL) 1.5 must be in [0, 1]" in refused(f"{head}\n?,1,1,1.5,a\n")
    assert main([str(tmp_path / "nothing")]) == 2 and "no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Eight samples of two groups, answered with risks; a ninth is not scored."""
    answers = ["0.9", "0.2", "0.7", "0.4", "0.6", "0.6", "0.1", "0.8", "dunno"]
    samples = [
        Sample(input="?", target=str(i % 2 ^ 1), metadata={"sex": "f" if i < 4 else "m"}) for i in range(len(answers))
    ]
    outputs = [ModelOutput.from_content("mockllm/model", a) for a in answers]
    for output in outputs:
        output.usage = ModelUsage()
    model = get_model("mockllm/model", custom_outputs=outputs)
    task = Task(dataset=MemoryDataset(samples), scorer=numeric_risk_scorer(), name="risky")
    folder = str(tmp_path_factory.mktemp("logs"))
    return eval(task, model=model, log_dir=folder, display="none", max_connections=1)[0].location


def test_from_a_log_and_from_a_run(log, tmp_path, capsys):
    from pathlib import Path

    rows, source = read_rows(Path(log), "sex")
    assert source == Path(log) and [r.group for r in rows] == ["f"] * 4 + ["m"] * 4
    assert [r.risk for r in rows[:4]] == [0.9, 0.2, 0.7, 0.4] and [r.positive for r in rows[:2]] == [True, False]
    entry = Evaluation("risky", 0, 9, {"numeric_risk_scorer": {"accuracy": 0.8}}, log, 1.0)
    run = RunResult("r", "done", "e", "m", {}, {}, "h", evaluation=[entry])
    folder = tmp_path / "sweep" / "run"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(to_json(run))
    assert main([str(folder), "--group", "sex"]) == 0 and "AUC" in capsys.readouterr().out
    report = json.loads((folder / REPORT).read_text())
    assert [g["auc"] for g in report["groups"]] == [1.0, pytest.approx(0.125)] and report["samples"] == 8
    assert main([str(folder)]) == 2 and "no sample of" in capsys.readouterr().err
    assert main([str(folder.parent), "--group", "sex"]) == 2
    assert f"is no run; give a run's folder, an .eval log or a CSV, for example {folder}" in capsys.readouterr().err
