"""From logs to what a sweep shows: configurations, the best, comparisons with chance, and what is said of them."""

import csv
import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log, write_eval_log

from cruijff_kit.analysis import results_frame
from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, NO_BETTER_THAN_CHANCE, SAME_ANSWER
from cruijff_kit.analysis.estimates import estimate, estimate_evaluation
from cruijff_kit.analysis.measures import Samples, is_computable
from cruijff_kit.analysis.samples import load_constant_samples, load_item_scores, load_samples
from cruijff_kit.analysis.summary import write_summary
from cruijff_kit.analysis.sweep import analyse
from cruijff_kit.analysis.table_cells import describe_best
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.commands import table
from cruijff_kit.records.result import higher_is_better, to_json

LABELS = ["yes"] * 32 + ["no"] * 28
TRAINED_ON = ["yes"] * 55 + ["no"] * 45


def answers(right: float, seed: int) -> list[str]:
    """To LABELS, so many right."""
    draw = random.Random(seed)
    return [t if draw.random() < right else ("no" if t == "yes" else "yes") for t in LABELS]


@pytest.fixture(scope="module")
def base_model(evaluated):
    return evaluated([f"It is hard to say {i}" for i in range(60)], LABELS, TRAINED_ON, epoch=None)


@pytest.fixture(scope="module")
def six(evaluated, finished, base_model):
    """Two configurations of three seeds, one of one seed; the second always answers yes."""
    runs = [
        finished(4, s, evaluated(answers(0.9, s), LABELS, TRAINED_ON), base_model, 0.3 + s / 100) for s in (1, 2, 3)
    ]
    runs += [finished(8, s, evaluated(["yes"] * 60, LABELS, TRAINED_ON), base_model, 0.6 + s / 100) for s in (1, 2, 3)]
    return [*runs, finished(16, 1, evaluated(answers(0.7, 9), LABELS, TRAINED_ON), base_model, 0.9)]


def of(analysis, name: str, against: str, scorer: str = "match"):
    return next(c for c in analysis.comparisons[name] if (c.against, c.scorer) == (against, scorer))


def test_runs_that_differ_in_their_seed_are_one_configuration(six):
    found = analyse(six)
    assert [(c.name, c.seeds) for c in found.configurations] == [
        ("rank=4", [1, 2, 3]), ("rank=8", [1, 2, 3]), ("rank=16,seed=1", [1])
    ]  # fmt: skip
    assert found.ranking.leader.name == "rank=4" and found.ranking.split == "validation"
    assert {c.seeds for c in found.comparisons["rank=4"]} == {3}
    # Two seeds of one configuration are never tested against each other.
    assert {(name, c.against) for name, cs in found.comparisons.items() for c in cs} == {
        (n, a) for n in found.comparisons for a in (BASE_MODEL, CHANCE, BEST) if (n, a) != ("rank=4", BEST)
    }
    assert found.is_best(six[2]) and not found.is_best(six[3])


def test_the_default_seed_is_a_seed(evaluated, finished, base_model):
    """A sweep with seed=1,2 after a run without, which has the default one."""
    cells = [evaluated(answers(0.9, s), LABELS, TRAINED_ON) for s in range(3)]
    runs = [finished(4, 1234, cells[0], base_model, swept_seed=False)]
    runs += [finished(4, s, cells[s], base_model) for s in (1, 2)]
    (one,) = analyse(runs).configurations
    assert one.seeds == [1, 2, 1234] and one.name == "rank=4" and one.swept == {"lora.rank": 4}
    again = finished(4, 2, cells[0], base_model)
    (one,) = analyse([*runs, again]).configurations
    assert one.runs[1] is again, "of a seed that ran twice the later run"


def test_one_answer_always_earns_no_p(six, capsys):
    """It is far above the base model, which writes no label, and says nothing of any item."""
    found = analyse(six)
    for against in (BASE_MODEL, CHANCE):
        c = of(found, "rank=8", against)
        assert math.isnan(c.p) and math.isnan(c.p_holm) and c.method == SAME_ANSWER and not c.is_different
        assert c.to_dict()["p"] is None
    assert of(found, "rank=8", BASE_MODEL).difference == pytest.approx(32 / 60)
    assert of(found, "rank=8", CHANCE).difference == 0
    assert of(found, "rank=4", CHANCE).is_different and of(found, "rank=4", BASE_MODEL).p_holm < 0.001


def test_random_labels_are_no_finding(evaluated, finished):
    """A model that writes labels at random: above the base model, not above chance."""
    draw = random.Random(0)
    targets = [draw.choice("+-") for _ in range(100)]
    base_model = evaluated(["?"] * 100, targets, targets, epoch=None)
    runs = [
        finished(r, 1, evaluated([draw.choice("+-") for _ in targets], targets, targets), base_model) for r in (4, 8)
    ]
    found = analyse(runs)
    for c in found.configurations:
        assert of(found, c.name, CHANCE).p_holm > 0.05
        assert 0.4 < c.runs[0].evaluation[0].metrics["match"]["accuracy"] < 0.62


def test_no_better_than_chance_is_no_finding(evaluated, finished, base_model):
    """One label but for a single answer; and one that is worse than the base model, which is a finding."""
    nearly = ["yes"] * 59 + ["It"]
    good = evaluated(answers(0.95, 2), LABELS, TRAINED_ON, epoch=None)
    runs = [
        finished(4, 1, evaluated(nearly, LABELS, TRAINED_ON), base_model),
        finished(8, 1, evaluated(answers(0.2, 2), LABELS, TRAINED_ON), good),
    ]
    found = analyse(runs)
    assert not runs[0].evaluation[0].constant_answer
    c = of(found, "rank=4,seed=1", BASE_MODEL)
    assert math.isnan(c.p) and c.method == NO_BETTER_THAN_CHANCE and c.difference > 0.5
    assert of(found, "rank=4,seed=1", CHANCE).p == 1
    assert (
        of(found, "rank=8,seed=1", BASE_MODEL).p_holm < 0.001 and of(found, "rank=8,seed=1", BASE_MODEL).difference < 0
    )


def test_two_constants_are_not_compared(evaluated, finished, base_model):
    runs = [finished(r, 1, evaluated([a] * 60, LABELS, TRAINED_ON), base_model, r) for r, a in ((4, "yes"), (8, "no"))]
    found = analyse(runs)
    assert math.isnan(of(found, "rank=8,seed=1", BEST).p) and of(found, "rank=8,seed=1", BEST).method == SAME_ANSWER
    assert found.detectable["count"].correlation == 0.5 and not found.detectable["count"].observed


def test_chance_is_paired_by_item(six):
    """The constant's score of each sample stands in the log; its mean is the evaluation's chance."""
    cell = six[0].evaluation[0]
    ids, constant = load_constant_samples(cell.log, "match", "accuracy")
    assert constant.value.mean() == pytest.approx(32 / 60) == pytest.approx(cell.chance["match"]["accuracy"])
    own = load_samples(cell.log, "match")[1]
    c = of(analyse(six[:1]), "rank=4,seed=1", CHANCE)
    assert c.difference == pytest.approx(float((own.value - constant.value).mean())) and c.method == "McNemar, exact"


def test_numbers_that_are_not_parsed_do_not_win(evaluated, finished):
    """Five right and 95 without a number: behind one that is nearly right everywhere, and before one that says none."""
    targets = [str(10 + i % 40) for i in range(100)]
    near = [str(int(t) + 1) for t in targets]
    base_model = evaluated(["none"] * 100, targets, targets, epoch=None, numbers=True)
    made = [near, targets[:5] + ["dunno"] * 95, ["dunno"] * 100, ["1000"] * 50 + ["-1000"] * 50]
    runs = [
        finished(r, 1, cell, base_model, objective_name="mae", objective=cell.metrics["continuous_scorer"]["mae"])
        for r, a in enumerate(made, 2) for cell in [evaluated(a, targets, targets, numbers=True)]
    ]  # fmt: skip
    found = analyse(runs)
    assert [c.swept["lora.rank"] for c in found.ranking.configurations] == [2, 3, 5, 4], (
        "that which says nothing is the last"
    )
    (name,) = [c.name for c in found.configurations if c.swept["lora.rank"] == 3]
    mae = runs[1].objective
    assert mae > 8 and estimate(found.configurations[1], "count", "continuous_scorer", "mae").low > 5
    assert of(found, name, CHANCE, "continuous_scorer").difference < 0, "five right ones"


def test_the_best_is_a_set(evaluated, finished, base_model):
    """Four of six runs tie: none of them is the first. Chosen on the test split, its interval is for all six."""
    cells = [evaluated(answers(right, 5), LABELS, TRAINED_ON) for right in (0.9, 0.9, 0.9, 0.9, 0.5, 0.2)]
    runs = [
        finished(r, 1, c, base_model, objective_name="accuracy", objective=c.metrics["match"]["accuracy"])
        for r, c in enumerate(cells, 2)
    ]  # fmt: skip
    found = analyse(runs)
    assert [c.swept["lora.rank"] for c in found.ranking.best] == [2, 3, 4, 5]
    data = found.to_dict()["best"]
    assert data["runs"] == [r.name for r in runs[:4]] and (data["chosen_by"], data["split"]) == ("accuracy", "test")
    line = describe_best(found.ranking)
    assert "scores are too good" in line and "indistinguishable from it: rank=3" in line
    leader, other = found.configurations[0], found.configurations[1]
    measured = ("count", "match", "accuracy")
    corrected, plain = (
        estimate(other, *measured, level=found.interval_level(other, measured)),
        estimate(leader, *measured),
    )
    assert corrected.level == pytest.approx(1 - 0.05 / 6) and corrected.low < plain.low and corrected.high > plain.high
    assert other in found.ranking.best and [found.interval_level(c, measured) for c in found.configurations[4:]] == [
        0.95,
        0.95,
    ]


def test_chosen_by_the_validation_loss(six, evaluated, finished, base_model):
    """However well another does on the test split."""
    worse = finished(32, 1, evaluated(answers(0.6, 3), LABELS, TRAINED_ON), base_model, 0.1)
    found = analyse([*six, worse])
    assert found.ranking.leader.runs == [worse]
    line = describe_best(found.ranking)
    assert line.startswith("* best by validation_loss on the validation split: rank=32") and "too good" not in line
    assert found.interval_level(found.ranking.leader) == 0.95
    assert of(found, "rank=4", BEST).difference > 0


def test_numbers_of_the_split_that_chose_are_flattered(six):
    """Here the task asks the rows of the validation split, whose loss chose."""
    asked = [
        dataclasses.replace(r, evaluation=[dataclasses.replace(e, split="validation") for e in r.evaluation])
        for r in six
    ]
    found = analyse(asked)
    assert found.interval_level(found.ranking.leader, ("count", "match", "accuracy")) == pytest.approx(
        1 - 0.05 / len(found.configurations)
    )
    assert "the validation split chose it, so that its scores are too good" in describe_best(found.ranking)


def test_validation_rows_tell_what_is_better(finished, base_model, tmp_path, evaluated):
    """Losses row by row: two that differ by noise are both the best, a third is worse."""
    draw, cell = random.Random(0), evaluated(answers(0.9, 1), LABELS, TRAINED_ON)
    hard = [draw.uniform(1, 4) for _ in range(80)]
    runs = []
    for rank, lift in ((4, 0.0), (8, 0.0), (16, 0.8)):
        losses = [h + lift + draw.gauss(0, 0.4) for h in hard]
        labels = [2 + i % 3 for i in range(80)]
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = {"epoch": 0, "loss": losses, "labels": labels}
        (folder / "validation_losses.json").write_text(json.dumps(rows))
        runs.append(finished(rank, 1, cell, base_model, sum(losses) / sum(labels), paths={"run": str(folder)}))
    found = analyse(runs)
    assert {c.swept["lora.rank"] for c in found.ranking.best} == {4, 8} and not found.ranking.note
    (c,) = [c for c in found.comparisons["rank=16,seed=1"] if c.metric == "validation_loss"]
    leader = found.ranking.leader.runs[0]
    assert c.difference == pytest.approx(runs[2].objective - leader.objective) and c.is_different and c.items == 80
    (folder / "validation_losses.json").write_text("{")
    assert "is unknown" in analyse(runs[::-1]).ranking.note


def test_one_family_for_holm(six):
    """All that is tested is corrected together: the smallest p times all tests."""
    found = analyse(six)
    tested = [c for cs in found.comparisons.values() for c in cs if not math.isnan(c.p)]
    smallest = min(tested, key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(min(1, smallest.p * len(tested)))
    assert all((c.p_holm < 0.05) == (not c.low <= 0 <= c.high) for c in tested)


def test_one_seed_each_is_said(six):
    found = analyse([six[0], six[6]])
    assert "Each configuration has one seed" in found.one_seed_notice
    assert "seed=1,2,3 would take 4 more runs, about 4 seconds" in found.one_seed_notice
    other = [dataclasses.replace(r, settings=r.settings | {"seed": 1234}) for r in (six[0], six[6])]
    assert "would take 6 more runs, about 6 seconds" in analyse(other).one_seed_notice
    assert analyse(six).one_seed_notice == "" == analyse(six[:1]).one_seed_notice


def test_what_could_be_found(six):
    found = analyse(six).detectable["count"]
    assert found.items == 60 and found.configurations == 3 and found.observed and 0.05 < found.difference < 0.4
    assert analyse(six).to_dict()["detectable_difference"]["count"]["difference"] == found.difference


def test_in_the_table_and_everywhere(six, tmp_path, capsys):
    for r in six:
        (tmp_path / r.name).mkdir()
        (tmp_path / r.name / "result.json").write_text(to_json(r))
    assert table.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "chance (the best constant answer): match accuracy 0.533" in shown
    assert re.search(r"^rank=8 +match accuracy +\+0\.53 \[.*\] no test: one answer to all", shown, flags=re.MULTILINE)
    assert re.search(r"^\* rank=4 +match accuracy .* p<0\.001 ", shown, flags=re.MULTILINE)
    line = next(line for line in shown.splitlines() if line.startswith("rank=8,seed=1"))
    assert "0.533 [0.409, 0.654]" in line, "Wilson's"
    assert re.search(r"^rank=4 +1, 2, 3 +loss", shown, flags=re.MULTILINE)
    assert table.main([str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {*data} == {"runs", "best", "configurations", "detectable_difference"}
    run = next(r for r in data["runs"] if r["name"] == "rank=8,seed=2")
    assert run["configuration"] == "rank=8" and {c["against"] for c in run["comparisons"]} == {
        "base model",
        "chance",
        "best",
    }
    assert run["evaluation"][0]["chance"]["match"]["accuracy"] == pytest.approx(32 / 60)
    frame = results_frame.read_sweep(tmp_path)
    assert frame["best"].tolist().count(True) == 3
    assert frame["versus chance count/match/accuracy difference"].iloc[0] > 0.2
    assert frame["chance count/match/accuracy"].iloc[0] == pytest.approx(32 / 60)
    assert table.main([str(tmp_path), "--csv"]) == 0
    assert len(list(csv.DictReader(capsys.readouterr().out.splitlines()))) == 7
    write_summary(tmp_path)
    summary = (tmp_path / "experiment_summary.md").read_text()
    assert "Best by validation_loss on the validation split: rank=4" in summary and "**rank=4,seed=1**" in summary


def test_of_several_epochs_the_last_counts(six, evaluated):
    early = evaluated(answers(0.1, 1), LABELS, TRAINED_ON)
    result = dataclasses.replace(six[0], evaluation=[early, six[0].evaluation[0]])
    assert of(analyse([result]), result.name, BASE_MODEL).difference > 0.7


def test_read_once_and_gone_later(evaluated, cache, tmp_path):
    cell = evaluated(answers(1.0, 1), LABELS, TRAINED_ON)
    assert set(load_item_scores(cell.log)["match"].values()) == {1.0}
    copy = tmp_path / "copy.eval"
    copy.write_bytes(Path(cell.log).read_bytes())
    count = len(list((cache / "items").iterdir()))
    load_item_scores(str(copy))
    assert len(list((cache / "items").iterdir())) == count, "a copy is the same log"
    copy.write_text("no log")
    assert load_item_scores(str(copy)) == load_item_scores(str(tmp_path / "gone.eval")) == {}
    assert load_samples(str(copy), "match") is None
    # An accuracy keeps its interval: it needs no more than the number of samples.
    cell.log = "gone.eval"
    found = estimate_evaluation(cell, "match", "accuracy")
    assert (found.low, found.high) == pytest.approx((0.9398, 1.0), abs=1e-3)


def test_unscored_items_are_left_out_of_item_scores(evaluated):
    cell = evaluated(["1", "none", "5"], ["1", "2", "3"], ["1", "2", "3"], numbers=True)
    assert load_item_scores(cell.log) == {"continuous_scorer": {"0": 0.0, "2": 2.0}}


def test_validation_rows_of_one_unit_are_one(finished, base_model, tmp_path, evaluated):
    """60 rows of 6 respondents: losses that differ by respondent are six numbers, not 60."""
    draw, cell, runs = random.Random(0), evaluated(answers(0.9, 1), LABELS, TRAINED_ON), []
    unit = [i // 10 for i in range(60)]
    for rank, lift in ((4, 0.0), (8, 0.3)):
        own = [draw.gauss(0, 1) * (lift > 0) for _ in range(6)]
        losses = [2 + lift + own[u] for u in unit]
        r = finished(rank, 1, cell, base_model, sum(losses) / 60, paths={"run": str(tmp_path / f"{rank}")})
        r.training |= {"validation_losses": [sum(losses) / 60]}
        (tmp_path / f"{rank}").mkdir()
        rows = {"epoch": 0, "row": [*range(60)], "loss": losses, "labels": [1] * 60, "unit": unit}
        (tmp_path / f"{rank}" / "validation_losses.json").write_text(json.dumps(rows))
        runs.append(r)
    assert read_row_losses(runs).shape == (2, 6)
    assert read_row_losses(runs).mean(1) == pytest.approx([r.training["validation_losses"][0] for r in runs])
    (found,) = (c for c in analyse(runs).comparisons["rank=8,seed=1"] if c.task == "validation")
    assert found.items == 6 and found.p > 0.05


def test_the_order_of_a_log_changes_no_interval(evaluated):
    """The same samples, answered in another order."""
    cell = evaluated(answers(0.8, 3), LABELS, TRAINED_ON)
    log = read_eval_log(cell.log)
    random.Random(1).shuffle(log.samples)
    other = dataclasses.replace(cell, log=cell.log.replace(".eval", "-shuffled.eval"))
    write_eval_log(log, other.log)
    assert load_samples(cell.log, "match")[0] == load_samples(other.log, "match")[0]
    assert (load_samples(cell.log, "match")[1].value == load_samples(other.log, "match")[1].value).all()


def test_what_is_not_defined_is_not_compared():
    """An AUC of one class, an R² of equal numbers."""
    import numpy as np

    ones, order = np.ones(9), np.arange(9.0)
    assert not is_computable("auc", Samples(value=ones, positive=ones, order=order))
    assert is_computable("auc", Samples(value=ones, positive=np.arange(9) % 2, order=order))
    assert not is_computable("r_squared", Samples(value=ones, target=ones, prediction=order))


@pytest.mark.parametrize(("name", "higher"), [
    ("validation_mae", False), ("validation_rmse", False), ("validation_perplexity", False),
    ("risk/risk_scorer/c_ece", False), ("validation_word_error", False), ("number/continuous_scorer/r_squared", True),
    ("match/accuracy", True),
    ("auc", True), ("validation_exact", True),
])  # fmt: skip
def test_which_way_is_better(name, higher):
    assert higher_is_better(name) is higher
