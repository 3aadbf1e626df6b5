"""Groups by the command: from a CSV, a log and a run, one column or several, and the files that it writes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log, write_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from cruijff_kit.analysis.report.groups import make_tables
from cruijff_kit.analysis.subgroup_samples import read_logs, read_samples
from cruijff_kit.analysis.subgroups import DECISIONS, Row, compare_columns
from cruijff_kit.commands import heterogeneity
from cruijff_kit.commands.heterogeneity import PICTURE, REPORT, main
from cruijff_kit.evaluation.scorers import numeric_risk_scorer
from cruijff_kit.records.result import Evaluation, RunResult, to_json
from cruijff_kit.util.errors import UserError

HEADER = ["INPUT", "TRUE_LABEL", "PREDICTION", "P(TRUE LABEL)", "GROUP"]


def drawn(name: str, n: int, noise: float, seed: int) -> list[Row]:
    """A group whose risks follow the label with some noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, n)
    risks = np.clip(labels * 0.6 + 0.2 + draw.normal(0, noise, n), 0, 1)
    return [
        Row(name, float((r >= 0.5) == y), bool(y), float(r), float(r >= 0.5))
        for y, r in zip(labels, risks, strict=True)
    ]


ODD = [row for i, name in enumerate("abcde") for row in drawn(name, 80, 0.2 if name != "e" else 3.0, i)]


@pytest.fixture
def table(tmp_path):
    """ODD as v1's CSV (P(TRUE LABEL), not P(label = 1)), with columns for two others that are asked, and for their ages."""
    path = tmp_path / "predictions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*HEADER, "sex", "who", "age"])
        for i, r in enumerate(ODD):
            label = int(r.positive)
            answer = label if r.correct else "dunno" if i % 2 else 1 - label
            writer.writerow(
                ["?", label, answer, r.risk if label else 1 - r.risk, r.group, "fm"[i % 2], f"w{i // 4}", i]
            )
    return path


def test_the_command_on_a_csv(table, tmp_path, capsys):
    assert main([str(table), "--group", "GROUP"]) == 0
    shown = capsys.readouterr().out
    assert "GROUP: accuracy and AUC differ between groups (p < 0.001)" in shown
    *table_lines, last = shown.splitlines()
    assert last == f"written to {tmp_path / REPORT}" and max(map(len, table_lines)) <= 100
    report = json.loads((tmp_path / REPORT).read_text())
    (column,) = report["columns"]
    (expected,) = compare_columns(("GROUP", ODD))
    assert [g["auc"] for g in column["groups"]] == pytest.approx([g.auc for g in expected.groups])
    assert column["p"] == pytest.approx(expected.p) and report["source"] == str(table)
    assert report["flags"] == column["flags"] and len(report["flags"]) == 1
    assert (tmp_path / PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # What is neither label does not count as the positive one.
    selected = sum(r.risk >= 0.5 and not (i % 2 and not r.correct) for i, r in enumerate(ODD)) / 400
    assert column["all"]["selection_rate"] == pytest.approx(selected)


def test_every_figure_of_a_group_is_printed_with_its_interval(table, tmp_path, capsys):
    """In two tables, as one would be too wide; groups whose names are long, too."""
    assert main([str(table), "--group", "GROUP"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    (column,) = json.loads((tmp_path / REPORT).read_text())["columns"]
    for group in (*column["groups"], column["all"]):
        ends = {name: "[{:.2f}, {:.2f}]".format(*interval) for name, interval in group["intervals"].items()}
        assert len(ends) == 7
        lines = [line for line in shown.splitlines() if line.split()[:1] == [group["name"]]]
        assert len(lines) == 2
        assert lines[0].split("  ", 1)[1].split() == (
            f"{group['samples']} {group['accuracy']:.2f} {ends['accuracy']} {group['auc']:.2f} {ends['auc']} "
            f"{group['calibration']:+.2f} {ends['calibration']}").split()  # fmt: skip
        assert lines[1].split("  ", 1)[1].split() == (
            f"{group['selection_rate']:.2f} {ends['selection_rate']} "
            f"{group['true_positive_rate']:.2f} {ends['true_positive_rate']} "
            f"{group['false_positive_rate']:.2f} {ends['false_positive_rate']} "
            f"{group['r_ece']:.2f} {ends['r_ece']} ({group['r_ece_calibrated']:.2f})").split()  # fmt: skip
    assert "bias: mean risk less the share of positive labels" in shown
    assert "ECE (cal.): calibration error of the risk (that of a perfectly calibrated model)" in shown
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([*r[:4], f"the group called {r[4] * 40}", *r[5:]] for r in rows)])
    assert main([str(table), "--group", "GROUP"]) == 0
    long = capsys.readouterr().out.splitlines()[:-1]
    assert max(map(len, long[1:])) <= 100 and sum("the group ca" in line and "[" in line for line in long) >= 10


def test_few_figures_have_one_table():
    """Without risks there is no legend of them either."""
    (report,) = compare_columns(("x", [replace(row, risk=None, predicted=None) for row in ODD]))
    lines = heterogeneity._format_report(report).splitlines()
    assert [line.split() for line in lines if line.startswith("group ")] == [["group", "n", "accuracy"]]
    assert not any(line.startswith(("bias", "ECE")) for line in lines)


def test_the_report_has_an_interval_beside_every_figure():
    (report,) = compare_columns(("x", ODD))
    quality, rates = make_tables(report, "groups_1_x")
    for table, figures in ((quality, {"accuracy": "accuracy", "auc": "AUC", "calibration": "mean risk - share positive",
                                      "r_ece": "ECE"}),
                           (rates, {name: name.replace("_", " ") for name in DECISIONS})):  # fmt: skip
        for record, group in zip(table.records(), [*report.groups, report.all], strict=True):
            assert (record["x"], record["samples"]) == (group.name, group.samples)
            for metric, words in figures.items():
                shown = [record[words], record[f"{words} low"], record[f"{words} high"]]
                assert shown == [getattr(group, metric), *group.intervals[metric]]
    assert rates.name == "groups_1_x_rates" and quality.records()[0]["versus others: accuracy"] is not None
    (report,) = compare_columns(("x", [replace(row, risk=None, predicted=None) for row in ODD]))
    assert [t.name for t in make_tables(report, "groups_1_x")] == ["groups_1_x_table"]


def test_several_columns(table, tmp_path, capsys):
    """None named: all that name groups. Their p is corrected, and their intervals are wider."""
    assert main([str(table), "--to", str(tmp_path / "new"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [c["column"] for c in document["columns"]] == ["GROUP", "sex"] and document["left_out"] == ["who", "age"]
    group, sex = document["columns"]
    assert (
        group["p_holm"] == pytest.approx(2 * group["p"])
        and sex["flags"] == []
        and (tmp_path / "new" / PICTURE).exists()
    )
    assert main([str(table), "--group", "sex", "--group", "GROUP", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert [c["column"] for c in asked["columns"]] == ["sex", "GROUP"] and asked["columns"][1] == group
    assert main([str(table)]) == 0
    shown = capsys.readouterr().out
    assert "left out: who, age" in shown and "97.5% intervals (95% for all columns together)" in shown


def test_units(table, capsys):
    """Four answers of a person count as one: intervals that rest on a hundred persons are wider."""
    wide, plain = [], []
    for found, more in ((plain, []), (wide, ["--unit", "who"])):
        assert main([str(table), "--group", "GROUP", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["columns"][0])
    assert plain[0]["groups"][0]["units"] is None and wide[0]["groups"][0]["units"] == 20
    assert wide[0]["differences"] != plain[0]["differences"]
    assert main([str(table), "--unit", "whom"]) == 2 and "has no column whom" in capsys.readouterr().err


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
    assert "GROUP names 1 groups; there is nothing to compare" in refused(f"{head}\n?,1,1,0.5,a\n?,1,1,0.5,a\n")
    others = head.replace("GROUP", "age")
    assert "no column of" in refused(f"{others}\n?,1,1,0.5,1\n?,1,1,0.5,2\n")
    assert main([str(tmp_path / "nothing")]) == 2 and "no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Eight samples of two groups, answered with risks; a ninth has no answer, which is wrong."""
    answers = ["0.9", "0.2", "0.7", "0.4", "0.6", "0.6", "0.1", "0.8", "dunno"]
    samples = [
        Sample(input="?", target=str(i % 2 ^ 1), metadata={"sex": "f" if i < 4 else "m", "who": i // 2})
        for i in range(len(answers))
    ]
    outputs = [ModelOutput.from_content("mockllm/model", a) for a in answers]
    for output in outputs:
        output.usage = ModelUsage()
    model = get_model("mockllm/model", custom_outputs=outputs)
    task = Task(dataset=MemoryDataset(samples), scorer=numeric_risk_scorer(), name="risky")
    folder = str(tmp_path_factory.mktemp("logs"))
    return eval(task, model=model, log_dir=folder, display="none", max_connections=1)[0].location


def test_from_a_log_and_from_a_run(log, tmp_path, capsys):
    samples = read_samples(Path(log), ["sex"])
    rows = samples.columns["sex"]
    assert samples.source == Path(log) and [r.group for r in rows] == ["f"] * 4 + ["m"] * 5
    assert [r.risk for r in rows[:4]] == [0.9, 0.2, 0.7, 0.4] and [r.positive for r in rows[:2]] == [True, False]
    assert [r.predicted for r in rows[:4]] == [True, False, True, False] and rows[0].unit is None
    entry = Evaluation("risky", 0, 9, {"numeric_risk_scorer": {"accuracy": 0.8}}, log, 1.0)
    run = RunResult("r", "done", "e", "m", {}, {}, "h", evaluation=[entry])
    folder = tmp_path / "sweep" / "run"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(to_json(run))
    assert main([str(folder)]) == 0 and "AUC" in capsys.readouterr().out
    report = json.loads((folder / REPORT).read_text())
    (column,) = report["columns"]
    assert column["column"] == "sex" and [g["auc"] for g in column["groups"]] == [1.0, pytest.approx(0.5 / 6)]
    assert column["samples"] == 9 and column["groups"][0]["true_positive_rate"] == 1
    assert main([str(folder), "--group", "gender"]) == 2
    assert "has 'gender' in its metadata; there are sex" in capsys.readouterr().err
    assert main([str(folder), "--unit", "whom"]) == 2 and "has 'whom' in its metadata" in capsys.readouterr().err
    assert main([str(folder.parent), "--group", "sex"]) == 2
    assert f"is no run; give a run's folder, an .eval log or a CSV, for example {folder}" in capsys.readouterr().err


def test_the_log_says_which_samples_belong_together(log, tmp_path):
    """And what says so is no group itself."""
    asked = read_eval_log(log)
    asked.eval.metadata = {"unit_column": "who"}
    write_eval_log(asked, str(tmp_path / "own.eval"))
    samples = read_samples(tmp_path / "own.eval")
    assert [*samples.columns] == ["sex"] and [r.unit for r in samples.columns["sex"]] == list("001122334")
    assert [r.unit for r in read_samples(Path(log), ["sex"], "who").columns["sex"]] == list("001122334")
    assert compare_columns(*samples.columns.items())[0].groups[0].units == 2


def test_logs_of_several_seeds_are_one(log, tmp_path):
    other = read_eval_log(log)
    for sample in other.samples:
        score = sample.scores["numeric_risk_scorer"]
        if score.metadata["scored"]:
            score.metadata["risk"] = 0.5
    write_eval_log(other, str(tmp_path / "seed.eval"))
    rows = read_logs([Path(log), tmp_path / "seed.eval"]).columns["sex"]
    assert [r.risk for r in rows[:2]] == [pytest.approx(0.7), pytest.approx(0.35)] and len(rows) == 9


def test_samples_without_an_option_are_wrong(log, tmp_path):
    """Where their label is known; then they have the constant's risk."""
    other = read_eval_log(log)
    more = {"label": "0", "positive": "1", "constant": {"risk": 0.3, "predicted": "0"}}
    other.samples[8].scores["numeric_risk_scorer"].metadata |= more
    write_eval_log(other, str(tmp_path / "known.eval"))
    *_, last = read_samples(tmp_path / "known.eval").columns["sex"]
    assert (last.correct, last.positive, last.risk, last.predicted) == (0.0, False, 0.3, False)
    del other.samples[8].scores["numeric_risk_scorer"].metadata["constant"]  # then that of these samples
    write_eval_log(other, str(tmp_path / "unknown.eval"))
    *_, last = read_samples(tmp_path / "unknown.eval").columns["sex"]
    assert last.risk == pytest.approx(4 / 9)


def test_numbers_have_no_groups(tmp_path, log):
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "gone.eval")
    distances = read_eval_log(log)
    for sample in distances.samples:
        sample.scores["numeric_risk_scorer"].value = 3.0
    write_eval_log(distances, str(tmp_path / "numbers.eval"))
    with pytest.raises(UserError, match="are numbers; groups are compared by accuracy"):
        read_samples(tmp_path / "numbers.eval")
