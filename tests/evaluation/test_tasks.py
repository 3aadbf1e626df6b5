"""The tasks that ship: which scorers, options and groups they choose, as runs and as inspect-ai alone uses them."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from forked import forked
from inspect_ai import eval
from inspect_ai.analysis import EvalColumn, EvalColumns, SampleSummary, evals_df, samples_df
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model

import cruijff_kit
from cruijff_kit.errors import UserError
from cruijff_kit.evaluation.evaluate import EvaluationError
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.plan import check

SMALL = ["model=hf_llama", "device=cpu", "dtype=fp32", "lora.rank=4", "lr=1e-2", "num_warmup_steps=0"]
CENSUS = [
    "dataset=census",
    "dataset.arguments.wording=terse",
    "dataset.arguments.num_rows=200",
    "dataset.max_samples=64",
]


@pytest.fixture
def compose(tiny, tmp_path):
    def made(*overrides: str, name: str = "run"):
        return cruijff_kit.compose([*SMALL, f"model.path={tiny}", f"output_dir={tmp_path / name}", *overrides])

    return made


@pytest.fixture
def file(tmp_path):
    """A function: outputs of the test split -> the overrides for a file of the user's with them."""

    def made(*outputs: str) -> list[str]:
        rows = [{"input": f"row {n}", "output": o, "sex": "fm"[n % 2], "age": n, "note": None}
                for n, o in enumerate(outputs)]  # fmt: skip
        train = [{"input": f"learn {n}", "output": o} for n, o in enumerate(outputs)]
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"train": train, "test": rows}))
        return ["dataset=files", f"dataset.path={path}", "dataset.validation_split=null"]

    return made


def test_labels_of_ones_own_data(compose, file):
    """eval=risk finds the options in the test split; the last one in order is the positive one."""
    result = cruijff_kit.train_then_eval(compose(*file(*"nyynynyy"), "eval=risk", "epochs=4"))
    (entry,) = result.evaluation
    assert [*entry.metrics] == ["match", "risk_scorer"] and entry.coverage["risk_scorer"] == 1
    wanted = {"auc", "brier", "c_ece", "r_ece", "balanced_accuracy", "f1", "accuracy", "stderr", "coverage"}
    assert wanted <= set(entry.metrics["risk_scorer"]) and entry.metrics["risk_scorer"]["class_balance"] == 5 / 8
    assert result.objective == entry.metrics["match"]["accuracy"], "what is written counts first"
    log = read_eval_log(entry.log)
    for sample in log.samples:
        assert [*sample.scores["risk_scorer"].metadata["options"]] == ["n", "y"]
        assert len(sample.output.choices[0].logprobs.content[0].top_logprobs) == 20
    assert log.samples[3].metadata == {"split": "test", "row": 3, "sex": "m", "age": 3}


def test_options_that_are_named(compose, file):
    """For all tasks, for the function on every split, or for one cell."""
    data = [*file(*"nyynynyy"), "eval.baseline=false"]
    for argument in ("eval.task_args.options=[y,n]", "eval.task_args.risk.options=[y,n]"):
        config = compose(*data, "eval=risk", argument)
        assert {tuple(config.eval.arguments_of(name)["options"]) for name in config.eval.names} == {("y", "n")}
    (entry,) = cruijff_kit.train_then_eval(config).evaluation
    assert entry.metrics["risk_scorer"]["class_balance"] == 3 / 8
    both = compose(*data, "eval.tasks=[match,risk,risk@train]", "eval.task_args={risk: {options: [0, 1]}}")
    assert [both.eval.arguments_of(n) for n in both.eval.names] == [{}, {"options": [0, 1]}, {"options": [0, 1]}]


@pytest.mark.parametrize(
    ("outputs", "argument", "says"),
    [
        (["no", "yes"] * 4, "seed=1", r"the option 'no' is 2 tokens of this model \('n' 'o'\), not a single one"),
        (["y"] * 8, "seed=1", r"outputs of split 'test' are 1 different texts \('y'\), not 2 to 20 options; name them"),
        (
            [f"text {n}" for n in range(30)],
            "seed=1",
            r"30 different texts \('text 0', .*, ...\), .* or take eval=match",
        ),
        (["y", "n"] * 4, "eval.task_args.options=[y]", "options are two or more different texts"),
        (
            ["y", "n"] * 4,
            "eval.task_args.options=[a,b]",
            "task risk cannot run: the target '[yn]' is none of the scorer's options: 'a', 'b'",
        ),
    ],
)
def test_refused_before_training(compose, file, tmp_path, outputs, argument, says):
    with pytest.raises(UserError, match=says) as refused:
        cruijff_kit.train_then_eval(compose(*file(*outputs), "eval=risk", argument))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_numbers_in_order_and_as_they_are_written(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"test": [{"input": f"{n}", "output": o} for n, o in enumerate(["10", " 9", "9"])]}))
    built = TASKS["risk"](data=str(path))
    outputs = [ModelOutput.from_content("mockllm/model", "9") for _ in range(3)]
    for output in outputs:
        output.usage = ModelUsage()  # mockllm would fetch a tokenizer to count
    model = get_model("mockllm/model", custom_outputs=outputs)
    (log,) = eval(built, model=model, log_dir=str(tmp_path), display="none")
    assert "needs each token's log-probability" in log.error.message, "another model must give them"
    assert log.eval.scorers[1].options == {"option_tokens": [" 9", "10"]}


FITTING = [
    ("capitalization", {}, "capitalization"), ("synthetic_twins", {}, "risk"), ("bit_sequences", {}, "risk"),
    ("bit_sequences", {"label": "bernoulli", "p": 0.3}, "risk"), ("bit_sequences", {"label": "bernoulli", "p": 1}, "match"),
    *(("predictable_or_not", {"variant": v}, "match") for v in ("pp", "pu", "up", "uu")),
    *(("model_organisms", {"rule": r}, "risk") for r in ("parity", "first", "coin", "majority", "weighted_sum_binary")),
    ("model_organisms", {"rule": "first", "alphabet": "digits"}, "match"),
    ("model_organisms", {"rule": "constant"}, "match"),
    ("model_organisms", {"rule": "coin", "p": 0}, "match"), ("model_organisms", {"rule": "weighted_sum"}, "match"),
    ("model_organisms_memorization", {"rule": "coin"}, "risk"),
    ("census", {}, "risk"), ("census", {"target": "continuous"}, "number"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "arguments", "task"), FITTING, ids=str)
def test_the_task_that_fits_a_data_set_that_ships(compose, dataset, arguments, task):
    config = compose(f"dataset={dataset}", *(f"dataset.arguments.{k}={v}" for k, v in arguments.items()))
    assert config.eval.tasks == [task]
    if dataset not in ("synthetic_twins", "census"):  # their prompts are too long for the tiny model
        assert check(config).prompts_checked[task] > 0
    chosen = compose(f"dataset={dataset}", "eval=match", *(f"dataset.arguments.{k}={v}" for k, v in arguments.items()))
    assert chosen.eval.tasks == ["match"], "what the user says goes before"


def test_numbers(compose, tmp_path):
    """The untrained model writes none, which is no error; mae is the objective, and its ceiling is known."""
    result = cruijff_kit.train_then_eval(compose(*CENSUS, "dataset.arguments.target=continuous"))
    (before,), (after,) = result.baseline, result.evaluation
    assert before.coverage == {"continuous_scorer": 0} and before.unscored == {"continuous_scorer": 20}
    assert after.coverage["continuous_scorer"] > 0 and result.objective_name == "number/continuous_scorer/mae"
    assert result.objective == after.metrics["continuous_scorer"]["mae"] > after.ceiling["mae"] > 0


def test_a_trained_model_that_writes_no_number_fails_the_run(compose, file):
    words = file(*"0123")
    Path(words[1].partition("=")[2]).write_text(
        json.dumps({"train": [{"input": "a", "output": "b"}] * 8, "test": [{"input": "c", "output": "1"}] * 4})
    )
    with pytest.raises(
        EvaluationError, match="continuous_scorer scored 0 of 4 samples; the first: no number in the answer"
    ):
        cruijff_kit.train_then_eval(compose(*words, "eval=number", "epochs=8"))


def test_risks_as_numbers(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"test": [{"input": f"{n}", "output": o} for n, o in enumerate(["no", "yes", "no"])]}))
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in ("10%", "0.4", "0.35")]
    for output in outputs:
        output.usage = ModelUsage()
    model = get_model("mockllm/model", custom_outputs=outputs)
    task = TASKS["numeric_risk"](data=str(path), threshold=0.4)
    log = eval(task, model=model, log_dir=str(tmp_path), display="none", max_connections=1)[0]
    found = {k: v.value for k, v in log.results.scores[0].metrics.items()}
    assert found["accuracy"] == found["auc"] == found["parse_rate"] == 1
    assert found["brier"] == pytest.approx((0.1**2 + 0.6**2 + 0.35**2) / 3)


def test_a_run_on_the_census_by_sex(run_cli, environment, tiny, tmp_path):
    """From the command line to groups: train, then heterogeneity --group sex gives the JSON and the picture."""
    done = run_cli(*SMALL, f"model.path={tiny}", *CENSUS, "epochs=2", "eval.epochs=all", "eval.baseline=false",
                   f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr

    def heterogeneity(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked("heterogeneity", ["run", *arguments], tmp_path, environment)

    shown = heterogeneity("--group", "sex")
    assert shown.returncode == 0 and "female" in shown.stdout, shown.stderr
    report = json.loads((tmp_path / "run" / "heterogeneity_report.json").read_text())
    (column,) = report["columns"]
    assert [g["name"] for g in column["groups"]] == ["female", "male"] and column["samples"] == 20
    assert (tmp_path / "run" / "group_performance.png").read_bytes()[:4] == b"\x89PNG"
    entry = json.loads((tmp_path / "run" / "result.json").read_text())["evaluation"][-1]
    figures, metrics = column["all"], entry["metrics"]["risk_scorer"]
    assert figures["accuracy"] == pytest.approx(metrics["accuracy"]), "that of the last epoch"
    assert [figures[m] for m in ("auc", "r_ece")] == pytest.approx([metrics[m] for m in ("auc", "r_ece")])
    assert figures["share_positive"] == pytest.approx(metrics["class_balance"])
    wrong = heterogeneity("--group", "gender")
    assert wrong.returncode == 2 and "there are sex, age_group, education, occupation, marital" in wrong.stderr


def test_logs_as_data_frames(compose, file):
    """Who answered, as columns of inspect-ai's own data frames; their accuracy is that of result.json."""
    data = [*file(*"nyynynyy"), "eval=risk", "epochs=2", "eval.epochs=all"]
    cruijff_kit.train_then_eval(compose(*data, "lora.rank=8", name="before"))
    result = cruijff_kit.train_then_eval(compose(*data))
    assert result.baseline[0].cached, "a copy of the log that another run made"
    logs = Path(result.paths["run"]) / "eval"
    frame = evals_df(str(logs), columns=[*EvalColumns, EvalColumn("*", path="metadata")], quiet=True).set_index("log")
    for entry in result.evaluation + result.baseline:
        row = frame.loc[next(log for log in frame.index if log.endswith(Path(entry.log).name))]
        assert row["score_match_accuracy"] == entry.metrics["match"]["accuracy"]
        assert math.isclose(row["score_risk_scorer_coverage"], entry.coverage["risk_scorer"])
        assert (
            row["data_hash"] == result.data_hash
            and row["task"] == "risk"
            and row["base_model"] == result.paths["model"]
        )
        who = row[["run", "rank", "alpha", "epoch", "adapter", "config_hash"]]
        if entry.epoch is None:
            assert who["run"] == "untrained" and who[1:].isna().all(), "nothing of the run that asked it first"
        else:
            adapter = result.training["adapters"][entry.epoch]
            assert who.tolist() == [result.name, 4, 8, entry.epoch, adapter, result.config_hash]
    assert len(frame) == 3
    samples = samples_df(str(logs), columns=[*SampleSummary, EvalColumn("cell_*", path="metadata")], quiet=True)
    last = samples[samples["cell_epoch"] == 1]
    assert (last["score_match"] == "C").mean() == result.evaluation[-1].metrics["match"]["accuracy"]
    assert last["metadata_sex"].tolist() == ["f", "m"] * 4
