"""What a constant answer gets: as the task itself scores it, of training's outputs, said of each cell and each sample."""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean, median

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, accuracy, choice, includes, match, mean, scorer
from inspect_ai.solver import multiple_choice

import cruijff_kit
from cruijff_kit.evaluation.chance import TEST, TRAIN, chance_of, constants_of, is_constant, targets_of, with_chance
from cruijff_kit.evaluation.log_redaction import redact_eval_log
from cruijff_kit.evaluation.scorers import binary_scorer, exact, risk_scorer
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.runs.run import train_then_eval

SMALL = ["model=hf_llama", "device=cpu", "dtype=fp32", "lora.rank=2", "max_steps_per_epoch=1", "dataset=files",
         "dataset.validation_split=null", "lr=1e-6"]  # fmt: skip


def rows(outputs: list[str], what: str) -> list[dict[str, str]]:
    return [{"input": f"{what} {n}", "output": o} for n, o in enumerate(outputs)]


@pytest.fixture
def file(tmp_path):
    """A function: outputs of the training split (None: there is none) and of the test split -> a file with them."""

    def made(train: list[str] | None, test: list[str]) -> str:
        splits = {"test": rows(test, "ask")} | ({} if train is None else {"train": rows(train, "learn")})
        (tmp_path / "mine.json").write_text(json.dumps(splits))
        return str(tmp_path / "mine.json")

    return made


@pytest.fixture
def answered(tmp_path):
    """A function: task, answers -> the log of the task so answered, by sample."""

    def asked(built: Task, answers: list[str]):
        outputs = [ModelOutput.from_content("mockllm/model", text) for text in answers]
        for output in outputs:
            output.usage = ModelUsage()  # mockllm would fetch a tokenizer to count
        model = get_model("mockllm/model", custom_outputs=outputs)
        (log,) = eval(built, model=model, log_dir=str(tmp_path), display="none", max_connections=1)
        assert log.status == "success", log.error
        return log

    return asked


def metrics_of(log) -> dict[str, dict[str, float]]:
    return {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}


LABELS = ["y", "n", "y", "y", "n", "y", "y", "n"]
NUMBERS = ["3", "10", "4", "1", "25", "8"]


@pytest.mark.parametrize(
    ("name", "train", "test", "constants", "measured"),
    [
        ("match", LABELS, ["y", "n", "n", "y", "n"], ["y"], {"match": "accuracy stderr", "includes": "accuracy stderr"}),
        ("match", ["b", "a", "b", "a"], ["b", "a", "a"], ["a"], {"match": "accuracy stderr"}),
        ("match", ["-1", "1", "-1"], ["1", "-1", "2"], ["-1"], {"match": "accuracy", "includes": "accuracy"}),
        ("match", ["cafe\u0301", "caf\xe9", "x"], ["caf\xe9", "x"], ["caf\xe9"], {"match": "accuracy"}),
        ("number", NUMBERS, ["5", "7", "30"], ["6", "8.5"], {"continuous_scorer": "mae rmse r_squared"}),
        ("number", ["1,5", "2,5", "9"], ["1,234", "3,5"], ["2,5", "4,333333333333333"], {"continuous_scorer": "mae rmse"}),
        ("numeric_risk", LABELS, ["y", "n", "n", "y"], ["0.625"], {
            "numeric_risk_scorer": "accuracy stderr balanced_accuracy f1 auc brier r_ece c_ece"}),
        ("numeric_risk", ["n", "n", "y"], ["y", "n", "n", "y"], ["0.3333333333333333"], {
            "numeric_risk_scorer": "accuracy balanced_accuracy f1 auc brier r_ece c_ece"}),
    ],
)  # fmt: skip
def test_it_is_what_a_model_would_get_that_always_says_so(file, answered, name, train, test, constants, measured):
    """Of a number the median where absolute errors count, the mean where squared ones do."""
    built = TASKS[name](data=file(train, test), train_split="train")
    chance, source = chance_of(built, answered(built, ["nothing of the kind"] * len(test)).samples)
    assert source == TRAIN and chance.keys() == metrics_of(answered(built, [constants[0]] * len(test))).keys()
    for scorer_name, names in measured.items():
        for metric in names.split():
            constant = constants[-1 if metric in ("rmse", "r_squared") else 0]
            log = answered(built, [constant] * len(test))
            assert chance[scorer_name][metric] == pytest.approx(metrics_of(log)[scorer_name][metric]), metric
            for sample in log.samples if metric in ("accuracy", "mae") else ():
                score, value = sample.scores[scorer_name], sample.scores[scorer_name].value
                assert score.metadata["chance"] == pytest.approx({"C": 1, "I": 0}.get(value, value))
    assert not {"coverage", "parse_rate", "class_balance", "other"} & {m for v in chance.values() for m in v}


def test_what_cannot_be_read_counts_as_the_constant(file, answered):
    built = TASKS["number"](data=file(NUMBERS, ["5", "7", "30"]), train_split="train")
    log = answered(built, ["none", "no 7 or 8", "the 3rd"])
    values, chance = metrics_of(log)["continuous_scorer"], chance_of(built, log.samples)[0]["continuous_scorer"]
    assert values["parse_rate"] == 0 and chance == {m: values[m] for m in ("mae", "rmse", "r_squared")}
    half = metrics_of(answered(built, ["none", "7", "the 3rd"]))["continuous_scorer"]
    assert half["mae"] == pytest.approx((abs(5 - 6) + 0 + abs(30 - 6)) / 3) and half["parse_rate"] == pytest.approx(
        1 / 3
    )
    risks = TASKS["numeric_risk"](data=file(LABELS, ["y", "n", "n", "y"]), train_split="train")
    log = answered(risks, ["?"] * 4)
    values, chance = metrics_of(log)["numeric_risk_scorer"], chance_of(risks, log.samples)[0]["numeric_risk_scorer"]
    for metric in ("auc", "brier", "c_ece", "r_ece"):
        assert values[metric] == pytest.approx(chance[metric])
    assert values["accuracy"] == 0 and chance["accuracy"] == 0.5 and chance["auc"] == 0.5


@pytest.mark.parametrize(
    ("name", "train", "scorers"),
    [("match", ["a", "b", "c"], set()), ("number", ["many", "few"], set()), ("numeric_risk", ["p", "q"], set()),
     ("risk", ["p", "q", "q"], {"match"})],
)  # fmt: skip
def test_where_there_is_none(file, name, train, scorers):
    """Outputs that do not repeat, no numbers, other labels than those that are asked for."""
    built = TASKS[name](data=file(train, ["1", "2"]), train_split="train")
    constants = constants_of(built)
    names = [s.__qualname__ for s, c in zip(built.scorer, constants, strict=True) if c is not None]
    assert len(names) == len(scorers) and (name != "risk" or constants == ["q", None])


def test_which_rows_training_has(file):
    data = file(["b", "b", "a", "a", "a"], ["a", "b"])

    def text(**asked):
        return constants_of(TASKS["match"](data=data, **asked))[0]

    assert text(train_split="train") == "a" and text(train_split="train", train_samples=2) == "b"
    assert text(train_split="train", train_samples=4) == "a", "of two, the first in order"
    drawn = {text(train_split="train", train_samples=3, sample_seed=seed) for seed in range(9)}
    assert drawn == {"a", "b"}


def test_without_a_training_split_it_knows_the_targets(file, answered):
    for asked in ({}, {"train_split": "train"}):
        built = TASKS["match"](data=file(None, ["y", "n", "n", "n"]), **asked)
        chance, source = chance_of(built, answered(built, ["y"] * 4).samples)
        assert source == TEST and chance["match"]["accuracy"] == 0.75
    unlike = TASKS["match"](data=file(None, ["a", "a", "b", "c", "d"]))
    assert chance_of(unlike, answered(unlike, ["a"] * 5).samples) == ({}, None), "these are no labels"


def trained(tiny, tmp_path, data: str, *overrides: str):
    where = [f"model.path={tiny}", f"dataset.path={data}", f"output_dir={tmp_path / 'run'}"]
    return train_then_eval(cruijff_kit.compose([*SMALL, *where, *overrides]))


def test_a_run_says_it_of_each_cell(tiny, tmp_path, file):
    """Adapters and base model alike, from what was trained on; the log has names of splits, not what stands in them."""
    test = ["y", "n", "n", "n", "y", "n", "n", "n"]
    result = trained(tiny, tmp_path, file(LABELS, test), "eval=risk")
    (before,), (after,) = result.baseline, result.evaluation
    assert before.chance == after.chance and before.chance_from == after.chance_from == "train"
    share, wanted = 5 / 8, [o == "y" for o in test]
    assert after.chance["match"]["accuracy"] == after.chance["risk_scorer"]["accuracy"] == 0.25
    assert after.chance["risk_scorer"]["brier"] == pytest.approx(fmean((share - w) ** 2 for w in wanted))
    assert after.chance["risk_scorer"]["r_ece"] == pytest.approx(share - 0.25)
    assert after.chance["risk_scorer"]["auc"] == after.chance["risk_scorer"]["balanced_accuracy"] == 0.5
    log = read_eval_log(after.log)
    for sample, right in zip(log.samples, wanted, strict=True):
        assert {s.metadata["chance"] for s in sample.scores.values()} == {float(right)}
    assert log.eval.task_args["train_split"] == "train" and "constant" not in json.dumps(
        log.eval.model_dump(mode="json")
    )
    assert json.loads(Path(result.paths["run"], "result.json").read_text())["evaluation"][0]["chance"] == after.chance


def test_the_base_model_is_asked_again_where_the_constant_is_another(tiny, tmp_path, file):
    data = file([*LABELS, "n", "n", "n", "n", "n", "n"], ["y", "n", "n", "n"])

    def cached(*overrides: str) -> bool:
        result = trained(tiny, tmp_path / str(len([*tmp_path.iterdir()])), data, *overrides)
        return result.baseline[0].cached

    assert [cached("eval=risk"), cached("eval=risk", "lr=1e-5"), cached("eval=risk", "dataset.max_samples=8")] == [
        False, True, False
    ]  # fmt: skip
    texts = file(["a", "b", "c", "d"], ["e", "f"])
    found = [trained(tiny, tmp_path / f"texts{n}", texts, f"dataset.max_samples={n}").baseline[0] for n in (4, 2)]
    assert [e.cached for e in found] == [False, True] and found[0].chance == {} and found[0].chance_from is None


# Tasks of the user's ------------------------------------------------------------------------------------------------


@scorer(metrics=[accuracy(), mean()])
def longer():
    async def score(state, target):
        return Score(value="C" if len(state.output.completion) > 3 else "I")

    return score


@scorer(metrics=[mean()])
def length():
    async def score(state, target):
        return Score(value=len(state.output.completion))

    return score


def asking(targets: list[str | list[str]], scorer, **more) -> Task:
    samples = [Sample(input=f"{n}", target=t, **more) for n, t in enumerate(targets)]
    return Task(dataset=MemoryDataset(samples), scorer=scorer)


def own(built: Task) -> Task:
    return with_chance(built, targets_of(built), TEST)


@pytest.mark.parametrize(
    ("scorers", "targets", "chance"),
    [
        (match(), ["yes", "no", "no", "no"], {"match": 0.75}),
        (match(), ["yes", "no", "maybe", "never"], {}),
        ([exact(), includes()], ["a", "ab", "ab", "ab"], {"match": 0.75, "includes": 1.0}),
        (longer(), ["A", "B", "A", "A"], {"longer": 0.75}),
        (length(), ["A", "B", "A", "A"], {}),
        ([length(), match(), match()], ["A", "B", "A", "A"], {"match": 0.75, "match1": 0.75}),
        (binary_scorer(("A", "B")), ["A", "B", "B", "B"], {"binary_scorer": 0.75}),
        (match(), [["a", "b"], ["b"], ["c", "b"], ["c"]], {"match": 0.75}),
        ([longer(), match()], ["", "", "", ""], {}),
    ],
)
def test_a_task_of_ones_own(answered, scorers, targets, chance):
    """Where its targets are labels, and a score says right or wrong."""
    built = own(asking(targets, scorers))
    log = answered(built, ["nothing"] * 4)
    found, source = chance_of(built, log.samples)
    assert {name: values["accuracy"] for name, values in found.items()} == chance
    assert source == (TEST if chance else None)
    assert [*metrics_of(log)] == [*metrics_of(answered(asking(targets, scorers), ["nothing"] * 4))]


def test_letters_of_a_multiple_choice(answered):
    samples = [Sample(input=f"{n}", target=t, choices=["one", "two"]) for n, t in enumerate("ABBB")]
    built = own(Task(dataset=MemoryDataset(samples), solver=multiple_choice(), scorer=choice()))
    assert chance_of(built, answered(built, ["ANSWER: A"] * 4).samples) == (
        {"choice": {"accuracy": 0.75, "stderr": 0.25}}, TEST
    )  # fmt: skip


def test_a_task_that_is_always_the_same_object():
    """Its scorers are not wrapped anew each time that it is built."""
    built = asking(["a", "b", "a", "a"], [exact(), longer()])
    before = [*built.scorer]
    one, other = own(built), own(built)
    assert built.scorer == before and [s.__wrapped__ for s in one.scorer] == before == [
        s.__wrapped__ for s in other.scorer
    ]


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from cruijff_kit.evaluation.scorers import risk_scorer

@task
def letters():
    samples = [Sample(input=f"{n}", target=t) for n, t in enumerate("abbb" * 3)]
    return Task(dataset=samples, scorer=[match(), risk_scorer(("a", "b"))])
"""


def test_a_run_with_a_task_of_ones_own(tiny, tmp_path, file):
    """Its risk_scorer has the options' logits, though the task asks for no log-probabilities."""
    (tmp_path / "letters.py").write_text(TASK)
    result = trained(tiny, tmp_path, file(LABELS, LABELS), f"eval.tasks=[{tmp_path / 'letters.py'}@letters]")
    (entry,) = result.evaluation
    assert entry.coverage == {"match": 1, "risk_scorer": 1} and entry.chance_from == "test"
    assert entry.chance["match"]["accuracy"] == 0.75 and entry.chance["risk_scorer"]["brier"] == pytest.approx(0.1875)
    assert all("option_logits" in s.output.metadata for s in read_eval_log(entry.log).samples)


# What a run always says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answers", "constant"),
    [
        ("match", ["y", "y", " y\n", "y"], True), ("match", ["y", "n", "y", "y"], False), ("match", ["y"], False),
        ("number", ["5 of them", "5", "it is 5", "5.0"], True), ("number", ["5", "6", "5", "5"], False),
        ("number", ["a", "b", "c", "d"], False), ("number", ["a", "a", "a", "a"], True),
    ],
)  # fmt: skip
def test_whether_all_answers_are_one(file, answered, name, answers, constant):
    outputs = {"match": ["y", "n", "n", "y"], "number": ["1", "2", "3", "4"]}[name][: len(answers)]
    built = TASKS[name](data=file(outputs * 2, outputs))
    assert is_constant(answered(built, answers).samples) is constant


def test_red_data_keeps_the_number_alone(tmp_path, file, answered):
    built = TASKS["numeric_risk"](data=file(LABELS, ["y", "n", "n", "y"]), train_split="train")
    log = answered(built, ["0.2", "?", "0.7", "0.9"])
    config = cruijff_kit.compose(["dataset=files", f"dataset.path={tmp_path / 'mine.json'}", "output_dir=out"])
    kept = [s.scores["numeric_risk_scorer"].metadata for s in redact_eval_log(log, config, {}, ships=True).samples]
    assert [k["chance"] for k in kept] == [1, 0, 0, 1] and [k["scored"] for k in kept] == [True, False, True, True]
    assert [k["is_positive"] for k in kept] == [True, False, False, True] and "risk" not in kept[1]
    assert set().union(*kept) == {"chance", "scored", "is_positive", "risk", "confidence"}
    numbers = TASKS["number"](data=file(NUMBERS, ["5", "7"]), train_split="train")
    log = answered(numbers, ["6", "none"])
    kept = [s.scores["continuous_scorer"].metadata for s in redact_eval_log(log, config, {}, ships=True).samples]
    assert kept == [{"chance": 1.0, "scored": True}, {"chance": 1.0, "scored": False}]


def test_the_constants_themselves(file):
    built = TASKS["risk"](data=file(LABELS, ["y", "n"]), train_split="train")
    assert constants_of(built) == ["y", {"predicted": "y", "risk": 0.625, "confidence": 0.625}]
    built = TASKS["number"](data=file([*NUMBERS, "a few"], ["1", "2"]), train_split="train")
    values = [float(n) for n in NUMBERS]
    assert constants_of(built) == [{"median": median(values), "mean": fmean(values)}]
    assert targets_of(built) == Counter({"1": 1, "2": 1})
    assert risk_scorer().option_tokens == ("0", "1")
