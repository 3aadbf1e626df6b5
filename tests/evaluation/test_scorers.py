"""Scorers and metrics: against numbers computed by hand and by scikit-learn, then on answers of the tiny model."""

import json
import math

import numpy as np
import pytest
from inspect_ai import Task, eval, score
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig, Logprob, Logprobs, ModelOutput, ModelUsage, TopLogprob, get_model
from inspect_ai.scorer import SampleScore, Score
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score, roc_auc_score

import cruijff_kit
from cruijff_kit.errors import UserError
from cruijff_kit.evaluation import metrics
from cruijff_kit.evaluation.scorers import (
    binary_scorer,
    continuous_scorer,
    find_number,
    find_risk,
    numeric_risk_scorer,
    risk_scorer,
)
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.evaluation.tasks.answers import answers_task
from cruijff_kit.result import higher_is_better
from cruijff_kit.run import train_then_eval


def graded(risk: float, label: str) -> SampleScore:
    predicted = "1" if risk >= 0.5 else "0"
    kept = {"scored": True, "label": label, "predicted": predicted, "positive": "1", "said": predicted, "risk": risk,
            "confidence": max(risk, 1 - risk)}  # fmt: skip
    return SampleScore(score=Score(value="C" if predicted == label else "I", metadata=kept))


LOST = SampleScore(score=Score(value="N", metadata={"scored": False}))


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
    scores = [graded(float(r), str(y)) for r, y in zip(risks, labels, strict=True)] + [LOST] * 50
    predicted = (risks >= 0.5).astype(int)
    assert metrics.auc()(scores) == pytest.approx(roc_auc_score(labels, risks))
    assert metrics.brier()(scores) == pytest.approx(brier_score_loss(labels, risks))
    assert metrics.f1()(scores) == pytest.approx(f1_score(labels, predicted))
    assert metrics.balanced_accuracy()(scores) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics.accuracy()(scores) == pytest.approx((labels == predicted).mean())
    assert metrics.stderr()(scores) == pytest.approx((labels == predicted).std(ddof=1) / math.sqrt(200))
    assert metrics.coverage()(scores) == metrics.parse_rate()(scores) == 0.8
    confidence = np.maximum(risks, 1 - risks)
    expected = metrics.expected_calibration_error(confidence, (labels == predicted).astype(float))
    assert metrics.c_ece()(scores) == pytest.approx(expected)
    assert metrics.r_ece()(scores) == pytest.approx(metrics.expected_calibration_error(risks, labels))
    counts = metrics.confusion()(scores)
    assert counts["true_positives"] + counts["false_negatives"] == labels.sum() and counts["other"] == 50
    assert counts["class_balance"] == labels.mean()


def test_what_is_not_defined_is_nan_and_says_why(caplog):
    one_class = [graded(0.3, "1"), graded(0.8, "1")]
    assert math.isnan(metrics.auc()(one_class)) and "all 2 scored samples are of one class" in caplog.text
    assert metrics.balanced_accuracy()(one_class) == 0.5 and metrics.f1()(one_class) == pytest.approx(2 / 3)
    assert math.isnan(metrics.brier()([LOST])) and "brier" not in caplog.text, "coverage says it"
    assert metrics.coverage()([LOST]) == 0


def test_which_metrics_are_to_be_small():
    small = {n for n in dir(metrics) if not n.startswith("_") and not higher_is_better(f"risk_scorer/{n}")}
    assert {"brier", "c_ece", "r_ece", "mae", "rmse", "stderr"} <= small
    assert not small & {"auc", "accuracy", "f1", "balanced_accuracy", "coverage", "parse_rate", "r_squared"}


@pytest.mark.parametrize(
    ("text", "risk", "number"),
    [
        ("0.8", 0.8, 0.8), ("Risk: .25.", 0.25, 0.25), ("80%", 0.8, 80), ("I say 7, or 0.7", 0.7, 7), ("none", None, None),
        ("$1,234.50", None, 1234.5), ("-3 degrees", None, -3), ("1e-1", 0.1, 0.1), ("v2", None, None), ("-0.2", None, -0.2),
        ("1", 1, 1), ("", None, None), ("1e999", None, None), ("1,000", None, 1000),
    ],
)  # fmt: skip
def test_numbers_in_texts(text, risk, number):
    assert (find_risk(text), find_number(text)) == (risk, number)


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


def test_risk_of_another_model(tmp_path):
    """Compared by spelling, the vocabulary's mark for a space as one; a missing option leaves the sample unscored."""
    logprobs = [{"\u01201": 0.6, "\u01200": 0.2, "x": 0.1}, {"\u01200": 0.5, "\u01201": 0.25}, {"\u01201": 0.9}, None]
    outputs = answers("1", "0", "1", "", logprobs=logprobs)
    values, scores, _ = evaluated(outputs, ["1", "1", "1", "0"], risk_scorer((" 0", " 1")), tmp_path)
    assert [s.metadata.get("risk") for s in scores] == [pytest.approx(0.75), pytest.approx(1 / 3), None, None]
    assert [s.value for s in scores] == ["C", "I", "N", "N"]
    assert [s.reason for s in scores] == [None, None, "missing_option", "no_response"]
    assert values["coverage"] == 0.5 and values["accuracy"] == 0.5 and math.isnan(values["auc"])
    assert values["brier"] == pytest.approx((0.25**2 + (2 / 3) ** 2) / 2) and values["other"] == 2


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
    assert values["parse_rate"] == 0.75 and values["accuracy"] == pytest.approx(2 / 3) and values["auc"] == 1
    assert values["brier"] == pytest.approx((0.01 + 0.04 + 0.36) / 3)
    assert values["r_ece"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert values["c_ece"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)


def test_numbers(tmp_path):
    outputs = answers("$1,100", "about 250", "dunno", "400")
    values, scores, _ = evaluated(outputs, ["1000", "200", "300", "$400"], continuous_scorer(), tmp_path)
    assert (
        values["mae"] == 50 and values["rmse"] == pytest.approx(math.sqrt(12500 / 3)) and values["parse_rate"] == 0.75
    )
    around = sum((t - 1600 / 3) ** 2 for t in (1000, 200, 400))
    assert values["r_squared"] == pytest.approx(1 - 12500 / around)
    assert [s.value for s in scores] == [100, 50, "N", 0]
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
    """The risk is that of the model's own logits at the option's ids."""
    with_task(risk_scorer(), GenerateConfig(logprobs=True, top_logprobs=259))
    result = train_then_eval(compose("lr=1e-2", "epochs=3"))
    values = result.evaluation[0].metrics["risk_scorer"]
    assert values["coverage"] == 1 and values["class_balance"] == 0.5 and 0 <= values["auc"] <= 1
    log = read_eval_log(result.evaluation[0].log)
    for sample in log.samples:
        top = {t.token: t.logprob for t in sample.output.choices[0].logprobs.content[0].top_logprobs}
        odds = math.exp(top["1"] - top["0"])
        assert sample.scores["risk_scorer"].metadata["risk"] == pytest.approx(odds / (1 + odds))
    assert result.baseline[0].metrics["risk_scorer"]["coverage"] == 1
    again = score(log, risk_scorer(("1", "0")), action="overwrite", display="none")  # the model is gone
    for old, new in zip(log.samples, again.samples, strict=True):
        risks = [s.scores["risk_scorer"].metadata["risk"] for s in (old, new)]
        assert sum(risks) == pytest.approx(1)


def test_refused_before_training(compose, with_task):
    with_task(risk_scorer(("0", "1", "no")), GenerateConfig(logprobs=True, top_logprobs=20))
    with pytest.raises(UserError, match=r"the option 'no' is 2 tokens of this model \('n' 'o'\), not a single one"):
        train_then_eval(compose())
    with_task(risk_scorer(), GenerateConfig())
    config = compose("seed=2")
    with pytest.raises(UserError, match="needs each token's log-probability"):
        train_then_eval(config)
