"""From logs to the analysis of a sweep: configurations, the best, comparisons with chance, and their descriptions."""

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
TRAINING_OUTPUTS = ["yes"] * 55 + ["no"] * 45


def draw_answers(right: float, seed: int) -> list[str]:
    """Return answers to LABELS, of which a share is right."""
    rng = random.Random(seed)
    return [t if rng.random() < right else ("no" if t == "yes" else "yes") for t in LABELS]


@pytest.fixture(scope="module")
def base_model(evaluate):
    return evaluate([f"It is hard to say {i}" for i in range(60)], LABELS, TRAINING_OUTPUTS, epoch=None)


@pytest.fixture(scope="module")
def six(evaluate, make_result, base_model):
    """Two configurations of three seeds, one of one seed; the second always answers yes."""
    runs = [
        make_result(4, s, evaluate(draw_answers(0.9, s), LABELS, TRAINING_OUTPUTS), base_model, 0.3 + s / 100)
        for s in (1, 2, 3)
    ]
    runs += [
        make_result(8, s, evaluate(["yes"] * 60, LABELS, TRAINING_OUTPUTS), base_model, 0.6 + s / 100)
        for s in (1, 2, 3)
    ]
    return [*runs, make_result(16, 1, evaluate(draw_answers(0.7, 9), LABELS, TRAINING_OUTPUTS), base_model, 0.9)]


def find_comparison(analysis, name: str, against: str, scorer: str = "match"):
    return next(c for c in analysis.comparisons[name] if (c.against, c.scorer) == (against, scorer))


def test_runs_that_differ_in_their_seed_are_one_configuration(six):
    analysis = analyse(six)
    assert [(c.name, c.seeds) for c in analysis.configurations] == [
        ("rank=4", [1, 2, 3]), ("rank=8", [1, 2, 3]), ("rank=16,seed=1", [1])
    ]  # fmt: skip
    assert analysis.ranking.leader.name == "rank=4" and analysis.ranking.split == "validation"
    assert {c.seeds for c in analysis.comparisons["rank=4"]} == {3}
    # Two seeds of one configuration are never tested against each other.
    assert {(name, c.against) for name, cs in analysis.comparisons.items() for c in cs} == {
        (n, a) for n in analysis.comparisons for a in (BASE_MODEL, CHANCE, BEST) if (n, a) != ("rank=4", BEST)
    }
    assert analysis.is_best(six[2]) and not analysis.is_best(six[3])


def test_the_default_seed_is_a_seed(evaluate, make_result, base_model):
    """A sweep with seed=1,2 after a run without, which has the default one."""
    evaluations = [evaluate(draw_answers(0.9, s), LABELS, TRAINING_OUTPUTS) for s in range(3)]
    runs = [make_result(4, 1234, evaluations[0], base_model, is_seed_swept=False)]
    runs += [make_result(4, s, evaluations[s], base_model) for s in (1, 2)]
    (configuration,) = analyse(runs).configurations
    assert configuration.seeds == [1, 2, 1234] and configuration.swept == {"lora.rank": 4}
    assert configuration.name == "rank=4"
    repeated = make_result(4, 2, evaluations[0], base_model)
    (configuration,) = analyse([*runs, repeated]).configurations
    assert configuration.runs[1] is repeated, "if a seed ran twice, the later run counts"


def test_one_answer_always_earns_no_p(six, capsys):
    """The configuration is far above the base model, which writes no label, but its answer does not depend on the item."""
    analysis = analyse(six)
    for against in (BASE_MODEL, CHANCE):
        c = find_comparison(analysis, "rank=8", against)
        assert math.isnan(c.p) and math.isnan(c.p_holm) and c.method == SAME_ANSWER and not c.is_different
        assert c.to_dict()["p"] is None
    assert find_comparison(analysis, "rank=8", BASE_MODEL).difference == pytest.approx(32 / 60)
    assert find_comparison(analysis, "rank=8", CHANCE).difference == 0
    assert (
        find_comparison(analysis, "rank=4", CHANCE).is_different
        and find_comparison(analysis, "rank=4", BASE_MODEL).p_holm < 0.001
    )


def test_random_labels_are_no_finding(evaluate, make_result):
    """A model that writes labels at random: above the base model, not above chance."""
    rng = random.Random(0)
    targets = [rng.choice("+-") for _ in range(100)]
    base_model = evaluate(["?"] * 100, targets, targets, epoch=None)
    runs = [
        make_result(r, 1, evaluate([rng.choice("+-") for _ in targets], targets, targets), base_model) for r in (4, 8)
    ]
    analysis = analyse(runs)
    for c in analysis.configurations:
        assert find_comparison(analysis, c.name, CHANCE).p_holm > 0.05
        assert 0.4 < c.runs[0].evaluation[0].metrics["match"]["accuracy"] < 0.62


def test_no_better_than_chance_is_no_finding(evaluate, make_result, base_model):
    """One label but for a single answer; and one that is worse than the base model, which is a finding."""
    labels_and_it = ["yes"] * 59 + ["It"]
    good = evaluate(draw_answers(0.95, 2), LABELS, TRAINING_OUTPUTS, epoch=None)
    runs = [
        make_result(4, 1, evaluate(labels_and_it, LABELS, TRAINING_OUTPUTS), base_model),
        make_result(8, 1, evaluate(draw_answers(0.2, 2), LABELS, TRAINING_OUTPUTS), good),
    ]
    analysis = analyse(runs)
    assert not runs[0].evaluation[0].constant_answer
    c = find_comparison(analysis, "rank=4,seed=1", BASE_MODEL)
    assert math.isnan(c.p) and c.method == NO_BETTER_THAN_CHANCE and c.difference > 0.5
    assert find_comparison(analysis, "rank=4,seed=1", CHANCE).p == 1
    assert (
        find_comparison(analysis, "rank=8,seed=1", BASE_MODEL).p_holm < 0.001
        and find_comparison(analysis, "rank=8,seed=1", BASE_MODEL).difference < 0
    )


def test_two_constants_are_not_compared(evaluate, make_result, base_model):
    runs = [
        make_result(r, 1, evaluate([a] * 60, LABELS, TRAINING_OUTPUTS), base_model, r)
        for r, a in ((4, "yes"), (8, "no"))
    ]
    analysis = analyse(runs)
    assert (
        math.isnan(find_comparison(analysis, "rank=8,seed=1", BEST).p)
        and find_comparison(analysis, "rank=8,seed=1", BEST).method == SAME_ANSWER
    )
    assert analysis.detectable["count"].correlation == 0.5 and not analysis.detectable["count"].observed


def test_chance_is_paired_by_item(six):
    """The log has the constant's score of each sample; its mean is the evaluation's chance."""
    evaluation = six[0].evaluation[0]
    ids, constant = load_constant_samples(evaluation.log, "match", "accuracy")
    assert constant.value.mean() == pytest.approx(32 / 60) == pytest.approx(evaluation.chance["match"]["accuracy"])
    samples = load_samples(evaluation.log, "match")[1]
    c = find_comparison(analyse(six[:1]), "rank=4,seed=1", CHANCE)
    assert (
        c.difference == pytest.approx(float((samples.value - constant.value).mean())) and c.method == "McNemar, exact"
    )


def test_numbers_that_are_not_parsed_do_not_win(evaluate, make_result):
    """Five right numbers and 95 answers without one rank between numbers that are all nearly right, and no numbers."""
    targets = [str(10 + i % 40) for i in range(100)]
    near = [str(int(t) + 1) for t in targets]
    base_model = evaluate(["none"] * 100, targets, targets, epoch=None, numbers=True)
    answer_lists = [near, targets[:5] + ["dunno"] * 95, ["dunno"] * 100, ["1000"] * 50 + ["-1000"] * 50]
    runs = [
        make_result(r, 1, e, base_model, objective_name="mae", objective=e.metrics["continuous_scorer"]["mae"])
        for r, a in enumerate(answer_lists, 2) for e in [evaluate(a, targets, targets, numbers=True)]
    ]  # fmt: skip
    analysis = analyse(runs)
    assert [c.swept["lora.rank"] for c in analysis.ranking.configurations] == [2, 3, 5, 4], (
        "the run without a number is the last"
    )
    (name,) = [c.name for c in analysis.configurations if c.swept["lora.rank"] == 3]
    mae = runs[1].objective
    assert mae > 8 and estimate(analysis.configurations[1], "count", "continuous_scorer", "mae").low > 5
    assert find_comparison(analysis, name, CHANCE, "continuous_scorer").difference < 0, "five right ones"


def test_the_best_is_a_set(evaluate, make_result, base_model):
    """Four of six runs tie: none of them is the first. Chosen on the test split, its interval is for all six."""
    evaluations = [
        evaluate(draw_answers(right, 5), LABELS, TRAINING_OUTPUTS) for right in (0.9, 0.9, 0.9, 0.9, 0.5, 0.2)
    ]
    runs = [
        make_result(r, 1, c, base_model, objective_name="accuracy", objective=c.metrics["match"]["accuracy"])
        for r, c in enumerate(evaluations, 2)
    ]  # fmt: skip
    analysis = analyse(runs)
    assert [c.swept["lora.rank"] for c in analysis.ranking.best] == [2, 3, 4, 5]
    data = analysis.to_dict()["best"]
    assert data["runs"] == [r.name for r in runs[:4]] and (data["chosen_by"], data["split"]) == ("accuracy", "test")
    line = describe_best(analysis.ranking)
    assert "scores are too good" in line and "indistinguishable from it: rank=3" in line
    leader, other = analysis.configurations[0], analysis.configurations[1]
    metric_key = ("count", "match", "accuracy")
    corrected, plain = (
        estimate(other, *metric_key, level=analysis.interval_level(other, metric_key)),
        estimate(leader, *metric_key),
    )
    assert corrected.level == pytest.approx(1 - 0.05 / 6) and corrected.low < plain.low and corrected.high > plain.high
    assert other in analysis.ranking.best and [
        analysis.interval_level(c, metric_key) for c in analysis.configurations[4:]
    ] == [
        0.95,
        0.95,
    ]


def test_chosen_by_the_validation_loss(six, evaluate, make_result, base_model):
    """However well another does on the test split."""
    worse = make_result(32, 1, evaluate(draw_answers(0.6, 3), LABELS, TRAINING_OUTPUTS), base_model, 0.1)
    analysis = analyse([*six, worse])
    assert analysis.ranking.leader.runs == [worse]
    line = describe_best(analysis.ranking)
    assert line.startswith("* best by validation_loss on the validation split: rank=32") and "too good" not in line
    assert analysis.interval_level(analysis.ranking.leader) == 0.95
    assert find_comparison(analysis, "rank=4", BEST).difference > 0


def test_numbers_of_the_split_that_chose_are_flattered(six):
    """Here the task has the rows of the validation split, whose loss chose."""
    results = [
        dataclasses.replace(r, evaluation=[dataclasses.replace(e, split="validation") for e in r.evaluation])
        for r in six
    ]
    analysis = analyse(results)
    assert analysis.interval_level(analysis.ranking.leader, ("count", "match", "accuracy")) == pytest.approx(
        1 - 0.05 / len(analysis.configurations)
    )
    assert "the validation split chose it, so that its scores are too good" in describe_best(analysis.ranking)


def test_validation_rows_are_compared(make_result, base_model, tmp_path, evaluate):
    """Losses row by row: two that differ by noise are both the best, a third is worse."""
    rng, evaluation = random.Random(0), evaluate(draw_answers(0.9, 1), LABELS, TRAINING_OUTPUTS)
    base_losses = [rng.uniform(1, 4) for _ in range(80)]
    runs = []
    for rank, lift in ((4, 0.0), (8, 0.0), (16, 0.8)):
        losses = [h + lift + rng.gauss(0, 0.4) for h in base_losses]
        labels = [2 + i % 3 for i in range(80)]
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = {"epoch": 0, "loss": losses, "labels": labels}
        (folder / "validation_losses.json").write_text(json.dumps(rows))
        runs.append(make_result(rank, 1, evaluation, base_model, sum(losses) / sum(labels), paths={"run": str(folder)}))
    analysis = analyse(runs)
    assert {c.swept["lora.rank"] for c in analysis.ranking.best} == {4, 8} and not analysis.ranking.note
    (c,) = [c for c in analysis.comparisons["rank=16,seed=1"] if c.metric == "validation_loss"]
    leader = analysis.ranking.leader.runs[0]
    assert c.difference == pytest.approx(runs[2].objective - leader.objective) and c.is_different and c.items == 80
    (folder / "validation_losses.json").write_text("{")
    assert "is unknown" in analyse(runs[::-1]).ranking.note


def test_one_family_for_holm(six):
    """All tests are corrected together: the smallest p is multiplied by their number."""
    analysis = analyse(six)
    tested = [c for cs in analysis.comparisons.values() for c in cs if not math.isnan(c.p)]
    smallest = min(tested, key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(min(1, smallest.p * len(tested)))
    assert all((c.p_holm < 0.05) == (not c.low <= 0 <= c.high) for c in tested)


def test_one_seed_has_a_notice(six):
    analysis = analyse([six[0], six[6]])
    assert "Each configuration has one seed" in analysis.one_seed_notice
    assert "seed=1,2,3 would take 4 more runs, about 4 seconds" in analysis.one_seed_notice
    other = [dataclasses.replace(r, settings=r.settings | {"seed": 1234}) for r in (six[0], six[6])]
    assert "would take 6 more runs, about 6 seconds" in analyse(other).one_seed_notice
    assert analyse(six).one_seed_notice == "" == analyse(six[:1]).one_seed_notice


def test_what_could_be_found(six):
    d = analyse(six).detectable["count"]
    assert d.items == 60 and d.configurations == 3 and d.observed and 0.05 < d.difference < 0.4
    assert analyse(six).to_dict()["detectable_difference"]["count"]["difference"] == d.difference


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


def test_of_several_epochs_the_last_counts(six, evaluate):
    early = evaluate(draw_answers(0.1, 1), LABELS, TRAINING_OUTPUTS)
    result = dataclasses.replace(six[0], evaluation=[early, six[0].evaluation[0]])
    assert find_comparison(analyse([result]), result.name, BASE_MODEL).difference > 0.7


def test_read_once_and_gone_later(evaluate, cache, tmp_path):
    evaluation = evaluate(draw_answers(1.0, 1), LABELS, TRAINING_OUTPUTS)
    assert set(load_item_scores(evaluation.log)["match"].values()) == {1.0}
    copy = tmp_path / "copy.eval"
    copy.write_bytes(Path(evaluation.log).read_bytes())
    count = len(list((cache / "items").iterdir()))
    load_item_scores(str(copy))
    assert len(list((cache / "items").iterdir())) == count, "a copy is the same log"
    copy.write_text("no log")
    assert load_item_scores(str(copy)) == load_item_scores(str(tmp_path / "gone.eval")) == {}
    assert load_samples(str(copy), "match") is None
    # An accuracy keeps its interval, which needs the number of samples alone.
    evaluation.log = "gone.eval"
    e = estimate_evaluation(evaluation, "match", "accuracy")
    assert (e.low, e.high) == pytest.approx((0.9398, 1.0), abs=1e-3)


def test_unscored_items_are_left_out_of_item_scores(evaluate):
    evaluation = evaluate(["1", "none", "5"], ["1", "2", "3"], ["1", "2", "3"], numbers=True)
    assert load_item_scores(evaluation.log) == {"continuous_scorer": {"0": 0.0, "2": 2.0}}


def test_validation_rows_of_one_unit_are_one(make_result, base_model, tmp_path, evaluate):
    """60 rows of 6 respondents: losses that differ by respondent are six numbers, not 60."""
    rng, evaluation, runs = random.Random(0), evaluate(draw_answers(0.9, 1), LABELS, TRAINING_OUTPUTS), []
    unit = [i // 10 for i in range(60)]
    for rank, lift in ((4, 0.0), (8, 0.3)):
        shifts = [rng.gauss(0, 1) * (lift > 0) for _ in range(6)]
        losses = [2 + lift + shifts[u] for u in unit]
        r = make_result(rank, 1, evaluation, base_model, sum(losses) / 60, paths={"run": str(tmp_path / f"{rank}")})
        r.training |= {"validation_losses": [sum(losses) / 60]}
        (tmp_path / f"{rank}").mkdir()
        rows = {"epoch": 0, "row": [*range(60)], "loss": losses, "labels": [1] * 60, "unit": unit}
        (tmp_path / f"{rank}" / "validation_losses.json").write_text(json.dumps(rows))
        runs.append(r)
    assert read_row_losses(runs).shape == (2, 6)
    assert read_row_losses(runs).mean(1) == pytest.approx([r.training["validation_losses"][0] for r in runs])
    (comparison,) = (c for c in analyse(runs).comparisons["rank=8,seed=1"] if c.task == "validation")
    assert comparison.items == 6 and comparison.p > 0.05


def test_the_order_of_a_log_changes_no_interval(evaluate):
    """The same samples, answered in another order."""
    evaluation = evaluate(draw_answers(0.8, 3), LABELS, TRAINING_OUTPUTS)
    log = read_eval_log(evaluation.log)
    random.Random(1).shuffle(log.samples)
    shuffled = dataclasses.replace(evaluation, log=evaluation.log.replace(".eval", "-shuffled.eval"))
    write_eval_log(log, shuffled.log)
    assert load_samples(evaluation.log, "match")[0] == load_samples(shuffled.log, "match")[0]
    assert (load_samples(evaluation.log, "match")[1].value == load_samples(shuffled.log, "match")[1].value).all()


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
