"""Scorers and metrics: against numbers computed by hand and by scikit-learn, then on answers of the tiny model."""

import json
import math

import numpy as np
import pytest
from inspect_ai import Task, eval, score
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig, Logprob, Logprobs, ModelOutput, ModelUsage, TopLogprob, get_model
from inspect_ai.scorer import SampleScore, Score, match, scorer
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score, roc_auc_score

import cruijff_kit
from cruijff_kit.evaluation import metrics
from cruijff_kit.evaluation.engine import ChatModel
from cruijff_kit.evaluation.run_tasks import EvaluationItem, evaluate_item
from cruijff_kit.evaluation.scorers import (
    binary_scorer,
    continuous_scorer,
    exact,
    includes,
    numeric_risk_scorer,
    risk_scorer,
)
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.evaluation.tasks.common import answers_task
from cruijff_kit.models.placement import place_for_evaluation
from cruijff_kit.records.result import higher_is_better
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.runs.plan import plan_evaluation
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.training import process_cache
from cruijff_kit.util.errors import UserError


def graded(risk: float, label: str) -> SampleScore:
    predicted = "1" if risk >= 0.5 else "0"
    kept = {"scored": True, "label": label, "predicted": predicted, "positive": "1", "said": predicted, "risk": risk,
            "confidence": max(risk, 1 - risk)}  # fmt: skip
    return SampleScore(score=Score(value="C" if predicted == label else "I", metadata=kept))


def lost(label: str, **kept) -> SampleScore:
    """A sample that was not scored."""
    return SampleScore(score=Score(value="N", metadata={"scored": False, "label": label, "positive": "1"} | kept))


def test_calibration_by_hand():
    """Bins (0, .1] ... (.9, 1], a border in the lower one, 0 in the first."""
    error = metrics.expected_calibration_error
    assert error(np.array([0.0, 0.1]), np.array([0, 1])) == pytest.approx(abs(0.05 - 0.5))
    # .7 and .65 share (.6, .7]; .71 is alone: 2/3 |.675 - .5| + 1/3 |.71 - 1|
    p, a = np.array([0.7, 0.65, 0.71]), np.array([1, 0, 1])
    assert error(p, a) == pytest.approx(2 / 3 * abs(0.675 - 0.5) + 1 / 3 * 0.29)
    for i in range(1, 11):  # every border, in floating point too
        assert error(np.array([i / 10, i / 10 - 0.05]), np.array([1, 0])) == pytest.approx(abs(i / 10 - 0.025 - 0.5))


def test_metrics_equal_scikit_learn():
    draw = np.random.default_rng(0)
    labels, risks = draw.integers(0, 2, 200), draw.random(200).round(2)
    scores = [graded(float(r), str(y)) for r, y in zip(risks, labels, strict=True)]
    predicted = (risks >= 0.5).astype(int)
    assert metrics.auc()(scores) == pytest.approx(roc_auc_score(labels, risks))
    assert metrics.brier()(scores) == pytest.approx(brier_score_loss(labels, risks))
    assert metrics.f1()(scores) == pytest.approx(f1_score(labels, predicted))
    assert metrics.balanced_accuracy()(scores) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics.accuracy()(scores) == pytest.approx((labels == predicted).mean())
    assert metrics.stderr()(scores) == pytest.approx((labels == predicted).std(ddof=1) / math.sqrt(200))
    assert metrics.coverage()(scores) == metrics.parse_rate()(scores) == 1
    confidence = np.maximum(risks, 1 - risks)
    expected = metrics.expected_calibration_error(confidence, (labels == predicted).astype(float))
    assert metrics.c_ece()(scores) == pytest.approx(expected)
    assert metrics.r_ece()(scores) == pytest.approx(metrics.expected_calibration_error(risks, labels))
    counts = metrics.confusion()(scores + [lost("1")] * 50)
    assert counts["true_positives"] + counts["false_negatives"] == labels.sum() and counts["other"] == 50
    assert counts["class_balance"] == (labels.sum() + 50) / 250


@pytest.mark.parametrize("known", [True, False])
def test_samples_that_were_not_scored_count(known):
    """As wrong where answers are right or wrong, else as the constant: that of training, or of these samples' labels."""
    draw = np.random.default_rng(1)
    labels, risks = draw.integers(0, 2, 300), draw.random(300).round(2)
    gone = draw.random(300) < 0.4
    constant = {"predicted": "1", "risk": 0.7, "confidence": 0.7}
    if not known:
        share = labels.mean()
        constant = {"predicted": str(int(share > 0.5)), "risk": share, "confidence": max(share, 1 - share)}
    scores = [
        lost(str(y), **({"constant": constant} if known else {})) if g else graded(float(r), str(y))
        for r, y, g in zip(risks, labels, gone, strict=True)
    ]
    predicted = np.where(gone, 1 - labels, risks >= 0.5)  # wrong, whatever the label
    filled = np.where(gone, constant["risk"], risks)
    assert metrics.coverage()(scores) == pytest.approx(1 - gone.mean())
    assert metrics.accuracy()(scores) == pytest.approx((labels == predicted).mean())
    assert metrics.stderr()(scores) == pytest.approx((labels == predicted).std(ddof=1) / math.sqrt(300))
    assert metrics.balanced_accuracy()(scores) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics.f1()(scores) == pytest.approx(f1_score(labels, np.where(gone, 0, risks >= 0.5)))
    assert metrics.auc()(scores) == pytest.approx(roc_auc_score(labels, filled))
    assert metrics.brier()(scores) == pytest.approx(brier_score_loss(labels, filled))
    assert metrics.r_ece()(scores) == pytest.approx(metrics.expected_calibration_error(filled, labels))
    right = np.where(gone, labels == int(constant["predicted"]), labels == predicted).astype(float)
    confidence = np.where(gone, constant["confidence"], np.maximum(risks, 1 - risks))
    assert metrics.c_ece()(scores) == pytest.approx(metrics.expected_calibration_error(confidence, right))


def measured(predictions: list[float | None], targets: list[float], **constant: float) -> dict[str, float]:
    scores = [
        {"scored": p is not None, "target": t} | ({} if p is None else {"prediction": p})
        | ({"constant": constant} if constant else {})
        for p, t in zip(predictions, targets, strict=True)
    ]  # fmt: skip
    found = [SampleScore(score=Score(value="N", metadata=m)) for m in scores]
    return {"mae": metrics.mae()(found), "rmse": metrics.rmse()(found), "r_squared": metrics.r_squared()(found)}


def test_five_right_numbers_of_a_hundred_do_not_win():
    """Those without a number have the constant's error; a run that writes none has just that."""
    targets = np.random.default_rng(2).normal(50, 10, 100).round(1).tolist()
    few = measured([*targets[:5], *[None] * 95], targets, median=49.0, mean=51.0)
    assert few["mae"] == pytest.approx(np.abs(np.array(targets[5:]) - 49).sum() / 100)
    assert few["rmse"] == pytest.approx(math.sqrt(((np.array(targets[5:]) - 51) ** 2).sum() / 100))
    none = measured([None] * 100, targets, median=49.0, mean=51.0)
    own = measured([None] * 100, targets)
    assert own["r_squared"] == pytest.approx(0) and own["mae"] <= none["mae"] and own["rmse"] <= none["rmse"]
    close = measured([t + 3 for t in targets], targets, median=49.0, mean=51.0)
    assert close["mae"] < few["mae"] < none["mae"] and close["rmse"] < few["rmse"] < none["rmse"]


def test_what_is_not_defined_is_nan_and_says_why(caplog):
    one_class = [graded(0.3, "1"), graded(0.8, "1")]
    assert math.isnan(metrics.auc()(one_class)) and "all 2 samples are of one class" in caplog.text
    assert metrics.balanced_accuracy()(one_class) == 0.5 and metrics.f1()(one_class) == pytest.approx(2 / 3)
    assert math.isnan(metrics.brier()([])) and "brier" not in caplog.text
    assert metrics.coverage()([lost("1")]) == 0


def test_auc_by_log_odds():
    """Risks that round to 1 still have an order, and what is equal is a tie."""
    odds = [40.0, 41.0, 42.0, -50.0, 41.0, -50.0]
    labels = ["0", "0", "1", "0", "1", "1"]
    scores = [graded(1 / (1 + math.exp(-o)), y) for o, y in zip(odds, labels, strict=True)]
    assert {s.score.metadata["risk"] for s in scores[:3]} == {1.0}
    for sample, value in zip(scores, odds, strict=True):
        sample.score.metadata["log_odds"] = value
    wanted = [int(y) for y in labels]
    assert metrics.auc()(scores) == pytest.approx(roc_auc_score(wanted, odds))
    filled = [*scores, *(lost(y, constant={"risk": r}) for y, r in (("1", 0.5), ("0", 1.0), ("1", 0.0)))]
    assert metrics.auc()(filled) == pytest.approx(roc_auc_score([*wanted, 1, 0, 1], [*odds, 0.0, 99, -99]))


def test_which_metrics_are_to_be_small():
    small = {n for n in dir(metrics) if not n.startswith("_") and not higher_is_better(f"risk_scorer/{n}")}
    assert {"brier", "c_ece", "r_ece", "mae", "rmse", "stderr"} <= small
    assert not small & {"auc", "accuracy", "f1", "balanced_accuracy", "coverage", "parse_rate", "r_squared"}


def answers(*texts: str, logprobs: list[dict[str, float] | None] | None = None) -> list[ModelOutput]:
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in texts]
    for output in outputs:
        output.usage = ModelUsage()  # mockllm would fetch a tokenizer to count
    for output, alternatives in zip(outputs, logprobs or [], strict=logprobs is not None):
        top = [TopLogprob(token=t, logprob=math.log(p)) for t, p in (alternatives or {}).items()]
        content = [Logprob(token=top[0].token, logprob=top[0].logprob, top_logprobs=top)] if top else []
        output.choices[0].logprobs = Logprobs(content=content)
    return outputs


def evaluated(outputs, targets, scorer, tmp_path):
    """Metrics, scores and log of a task that a scripted foreign model answers."""
    task = Task(dataset=MemoryDataset([Sample(input="?", target=t) for t in targets]), scorer=scorer)
    model = get_model("mockllm/model", custom_outputs=outputs)
    log = eval(task, model=model, log_dir=str(tmp_path), display="none", max_connections=1)[0]
    if log.status != "success":
        return log.error.message, None, log
    found = {k: v.value for k, v in log.results.scores[0].metrics.items()}
    return found, [next(iter(s.scores.values())) for s in log.samples], log


PAIRS = [  # answer, target: the first two are taken for each other by inspect-ai's match(location="exact")
    ("5", "-5"), ("+", "-"), ("<", ">"), ("!", "?"), (":)", ":("), ("50", "50%"), ("C", "C++"), (".5", "5"), ("(a)", "a"),
    ("a.", "a"), ("A", "a"), ("\ufb01", "fi"), ("stra\xdfe", "strasse"), ("a b", "a  b"), ("", "a"), ("a\nb", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "target"), PAIRS)
def test_exact_is_exact(tmp_path, answer, target):
    values, *_ = evaluated(answers(answer, target), [target, target], exact(), tmp_path)
    assert values["accuracy"] == 0.5


def test_exact_and_includes(tmp_path):
    """Blanks around do not count, nor in how many code points a letter is written; the name in logs is match."""
    texts, targets = (
        ["  yes\n", "caf\xe9", "cafe\u0301 au lait", "YES", "-1"],
        ["yes ", "cafe\u0301", "caf\xe9", "yes", "1"],
    )
    values, scores, log = evaluated(answers(*texts), targets, [exact(), includes()], tmp_path)
    assert [s.value for s in scores] == ["C", "C", "I", "I", "I"] and log.results.scores[0].name == "match"
    assert [s.scores["includes"].value for s in log.samples] == ["C", "C", "C", "I", "C"]
    loose, *_ = evaluated(answers(*texts), targets, exact(case_sensitive=False), tmp_path)
    assert (values["accuracy"], loose["accuracy"]) == (0.4, 0.6)
    assert log.samples[0].scores["match"].answer == "yes" and scores[0].reason is None
    assert evaluated(answers("b"), [["a", "b"]], exact(), tmp_path)[0]["accuracy"] == 1


def test_a_log_scored_anew_does_not_take_another_match(tmp_path):
    """`inspect score` looks a scorer up by its name alone: inspect-ai's match refuses our parameters."""
    *_, log = evaluated(answers("5"), ["-5"], exact(case_sensitive=True), tmp_path)
    assert log.eval.scorers[0].name == "match" and log.eval.scorers[0].options == {"case_sensitive": True}
    with pytest.raises(TypeError, match="case_sensitive"):
        match(**log.eval.scorers[0].options)


def test_risk_of_another_model(tmp_path):
    """Compared by spelling, the vocabulary's mark for a space as one; a missing option leaves the sample unscored."""
    logprobs = [{"\u01201": 0.6, "\u01200": 0.15, "x": 0.1}, {"\u01200": 0.5, "\u01201": 0.25}, {"\u01201": 0.9}, None]
    outputs = answers("1", "0", "1", "", logprobs=logprobs)
    values, scores, _ = evaluated(outputs, ["1", "1", "1", "0"], risk_scorer((" 0", " 1")), tmp_path)
    assert [s.metadata.get("risk") for s in scores] == [pytest.approx(0.8), pytest.approx(1 / 3), None, None]
    assert [s.value for s in scores] == ["C", "I", "N", "N"]
    assert [s.reason for s in scores] == [None, None, "missing_option", "no_response"]
    odds = [s.metadata.get("log_odds") for s in scores]
    assert odds == [pytest.approx(math.log(4)), pytest.approx(-math.log(2)), None, None]
    assert values["coverage"] == 0.5 and values["accuracy"] == 0.25 and values["other"] == 2
    constant = 3 / 4  # the share of "1" among the targets, for want of a training split
    assert values["brier"] == pytest.approx((0.2**2 + (2 / 3) ** 2 + (1 - constant) ** 2 + constant**2) / 4)
    assert values["auc"] == pytest.approx(roc_auc_score([1, 1, 1, 0], [0.8, 1 / 3, constant, constant]))


def test_log_odds_of_several_options(tmp_path):
    """Of the last one against all others; a token that is impossible is as one that is missing."""
    outputs = answers("c", "c", logprobs=[{"a": 0.1, "b": 0.2, "c": 0.6}, {"a": 0.5, "c": 0.25}])
    impossible = TopLogprob(token="b", logprob=-math.inf)
    outputs[1].choices[0].logprobs.content[0].top_logprobs.append(impossible)
    _, scores, _ = evaluated(outputs, ["c", "c"], risk_scorer(("a", "b", "c")), tmp_path)
    assert scores[0].metadata["log_odds"] == pytest.approx(math.log(0.6 / 0.3))
    assert scores[0].metadata["risk"] == pytest.approx(0.6 / 0.9) and scores[1].reason == "missing_option"
    assert scores[1].metadata == {"scored": False, "label": "c", "positive": "c"}


def test_risk_needs_logprobs_and_known_targets(tmp_path):
    message, *_ = evaluated(answers("1"), ["1"], risk_scorer(), tmp_path)
    assert "needs each token's log-probability and alternatives" in message and "top_logprobs=20" in message
    outputs = answers("1", logprobs=[{"1": 0.5, "0": 0.5}])
    assert "'yes' is none of the scorer's options" in evaluated(outputs, ["yes"], risk_scorer(), tmp_path)[0]
    with pytest.raises(UserError, match="two or more different texts"):
        risk_scorer(("1", "1"))


def test_risk_as_text(tmp_path):
    outputs = answers("0.9", "Risk: 20%", "0.6", "no idea")
    values, scores, _ = evaluated(outputs, ["1", "0", "0", "1"], numeric_risk_scorer(), tmp_path)
    assert [s.metadata.get("risk") for s in scores] == [0.9, 0.2, 0.6, None]
    assert values["parse_rate"] == 0.75 and values["accuracy"] == 0.5
    assert values["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.25) / 4)
    assert values["auc"] == pytest.approx(roc_auc_score([1, 0, 0, 1], [0.9, 0.2, 0.6, 0.5]))
    assert "log_odds" not in scores[0].metadata, "a number that was written has no more digits than that"


def test_numbers(tmp_path):
    outputs = answers("$1,100", "about 250", "dunno", "400")
    values, scores, _ = evaluated(outputs, ["1000", "200", "300", "$400"], continuous_scorer(), tmp_path)
    median, mean = 350, 475  # of the targets, for want of a training split
    assert values["mae"] == (100 + 50 + abs(300 - median)) / 4 and values["parse_rate"] == 0.75
    squares = 100**2 + 50**2 + (300 - mean) ** 2
    assert values["rmse"] == pytest.approx(math.sqrt(squares / 4))
    around = sum((t - mean) ** 2 for t in (1000, 200, 300, 400))
    assert values["r_squared"] == pytest.approx(1 - squares / around)
    assert [s.value for s in scores] == [100, 50, "N", 0] and scores[2].metadata == {"scored": False, "target": 300}
    assert "needs a number as target" in evaluated(answers("1"), ["many"], continuous_scorer(), tmp_path)[0]


def test_options_as_text(tmp_path):
    outputs = answers("1", " 0\n", "maybe", "1")
    values, *_ = evaluated(outputs, ["1", "0", "1", "0"], binary_scorer(), tmp_path)
    assert values["accuracy"] == 0.5 and values["other"] == 1 and values["class_balance"] == 0.5
    cells = ("true_positives", "false_negatives", "false_positives", "true_negatives")
    assert [values[k] for k in cells] == [1, 0, 1, 1] and values["balanced_accuracy"] == 0.5


@pytest.fixture
def with_task(monkeypatch):
    def add(scorer, config: GenerateConfig):
        def made(**arguments) -> Task:
            built = answers_task(**arguments)
            built.scorer, built.config = [scorer], config
            return built

        monkeypatch.setitem(TASKS, "risky", made)

    return add


@pytest.fixture
def compose(tiny, tmp_path):
    """A run on bits with one wanted digit each, the tiny model."""
    rows = [{"input": f"{n:04b}", "output": str(n % 2)} for n in range(16)]
    (tmp_path / "bits.json").write_text(json.dumps({"train": rows[:8], "validation": rows[8:12], "test": rows[12:]}))

    def made(*overrides: str):
        model = [
            "model=hf_llama",
            f"model.path={tiny}",
            "device=cpu",
            "dtype=fp32",
            "lora.rank=4",
            "num_warmup_steps=0",
        ]
        data = ["dataset=files", f"dataset.path={tmp_path}/bits.json", "eval.tasks=[risky]", "eval.max_tokens=2"]
        return cruijff_kit.compose([*model, *data, f"output_dir={tmp_path / 'run'}", *overrides])

    return made


def test_risk_of_the_model_in_memory(compose, with_task):
    """The risk is that of the model's own logits at the option's ids, however unlikely they are."""
    with_task(risk_scorer(), GenerateConfig(logprobs=True, top_logprobs=259))
    result = train_then_eval(compose("lr=1e-2", "epochs=3"))
    values = result.evaluation[0].metrics["risk_scorer"]
    assert values["coverage"] == 1 and values["class_balance"] == 0.5 and 0 <= values["auc"] <= 1
    log = read_eval_log(result.evaluation[0].log)
    for sample in log.samples:
        top = {t.token: t.logprob for t in sample.output.choices[0].logprobs.content[0].top_logprobs}
        odds, kept = top["1"] - top["0"], sample.scores["risk_scorer"].metadata
        assert kept["log_odds"] == pytest.approx(odds, abs=1e-4) and kept["risk"] == pytest.approx(
            1 / (1 + math.exp(-odds))
        )
        logits = sample.output.metadata["option_logits"]
        assert kept["log_odds"] == logits["1"] - logits["0"], "of the logits, in full"
        assert all(np.float32(logit) == logit for logit in logits.values()) and [*logits] == ["0", "1"]
    assert result.baseline[0].metrics["risk_scorer"]["coverage"] == 1
    again = score(log, risk_scorer(("1", "0")), action="overwrite", display="none")  # the model is gone
    for old, new in zip(log.samples, again.samples, strict=True):
        before, after = (s.scores["risk_scorer"].metadata for s in (old, new))
        assert before["risk"] + after["risk"] == pytest.approx(1) and before["log_odds"] == -after["log_odds"]


@pytest.mark.parametrize(
    "settings", [{}, {"logprobs": True, "top_logprobs": 1}, {"temperature": 2.0, "num_choices": 2}], ids=str
)
def test_no_option_is_missing_whatever_the_task_asks_for(compose, with_task, settings):
    """The task need not ask for log-probabilities, nor be greedy."""
    with_task(risk_scorer(("Q", "0", "1")), GenerateConfig(**settings))
    (entry,) = train_then_eval(compose()).evaluation
    assert entry.coverage == {"risk_scorer": 1}
    for sample in read_eval_log(entry.log).samples:
        kept, logits = sample.scores["risk_scorer"].metadata, sample.output.metadata["option_logits"]
        assert kept["log_odds"] == pytest.approx(logits["1"] - np.logaddexp(logits["Q"], logits["0"]), abs=1e-12)
        assert kept["said"] in ("Q", "0", "1", "other")
        assert (kept["said"] != "other") == (sample.output.metadata["option_said"] is not None)


def test_a_scorer_of_ones_own_around_it(compose, with_task, tmp_path):
    """Nobody could know its options beforehand: the model is asked for their logits when they are needed."""

    @scorer(metrics=[metrics.auc(), metrics.coverage()])
    def doubled():
        inner = risk_scorer()

        async def score(state, target):
            found = await inner(state, target)
            found.metadata["log_odds"] *= 2
            return found

        return score

    def samples(scorer, name: str):
        with_task(scorer, GenerateConfig())
        (entry,) = train_then_eval(compose(f"output_dir={tmp_path / name}", "eval.baseline=false")).evaluation
        assert [*entry.coverage.values()] == [1]
        return read_eval_log(entry.log).samples

    for own, usual in zip(samples(doubled(), "own"), samples(risk_scorer(), "usual"), strict=True):
        assert own.output.metadata is None and usual.output.metadata is not None
        odds = [s.metadata["log_odds"] for s in (own.scores["doubled"], usual.scores["risk_scorer"])]
        assert odds[0] == pytest.approx(2 * odds[1], abs=1e-5) and own.scores["doubled"].metadata["said"] == "other"


@pytest.mark.real_model
def test_risks_of_a_model_in_bf16(smollm2, tmp_path):
    """60 prompts have 60 log-odds, in about the order that they have in fp32; its own logits would give eight of them."""

    def log_odds(dtype: str) -> list[float]:
        asked = [
            "dataset=census",
            "dataset.arguments.num_rows=600",
            "dataset.max_test_samples=60",
            "eval=risk",
            "device=cpu",
        ]
        config = cruijff_kit.compose(
            [*asked, f"model.path={smollm2}", f"dtype={dtype}", f"output_dir={tmp_path / dtype}"]
        )
        plan = plan_evaluation(config)
        model, machine = place_for_evaluation(config.torchtune)
        chat_model = ChatModel(model, process_cache.get_tokenizer(config.torchtune["tokenizer"]), machine)
        with chat_model.without_adapters():
            item = EvaluationItem(config.eval.names[0], chat_model, config, plan, RunFolder(config.output_dir), 0, "")
            entry = evaluate_item(item)
        assert entry.coverage == {"match": 1, "risk_scorer": 1}
        samples = sorted(read_eval_log(entry.log).samples, key=lambda s: s.id)
        return [s.scores["risk_scorer"].metadata["log_odds"] for s in samples]

    in_bf16, in_fp32 = log_odds("bf16"), log_odds("fp32")
    assert len({*in_bf16}) == len(in_bf16) == 60 and spearmanr(in_bf16, in_fp32).statistic > 0.9


def test_refused_before_training(compose, with_task):
    with_task(risk_scorer(("0", "1", "no")), GenerateConfig(logprobs=True, top_logprobs=20))
    with pytest.raises(UserError, match=r"the option 'no' is 2 tokens of this model \('n' 'o'\), not a single one"):
        train_then_eval(compose())
