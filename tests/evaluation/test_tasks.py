"""The tasks that ship: which scorers, options and groups they choose, as runs and as inspect-ai alone uses them."""

import dataclasses
import json
import math
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from forked import forked
from inspect_ai import eval
from inspect_ai.analysis import EvalColumn, EvalColumns, SampleSummary, evals_df, samples_df
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.solver import generate

import cruijff_kit
from cruijff_kit.analysis.sweep import analyse, analyse_briefly
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation.build_tasks import build_task, count_requests
from cruijff_kit.evaluation.targets import check_room
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.training import process_cache
from cruijff_kit.util.errors import UserError

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


def test_how_often_samples_ask(compose, file, tmp_path):
    """Each once in tasks that ship; what a solver of the user's does is not known."""
    config = compose(*file(*"nyynynyy"), "eval=match", "eval.limit=5")
    (name,) = config.eval.names
    task = build_task(name, config)
    assert count_requests(task, config) == 5
    assert count_requests(build_task(name, compose(*file(*"nyynynyy"), "eval=match")), compose()) == 8
    task.solver = generate()
    assert count_requests(task, config) is None


def test_labels_of_ones_own_data(compose, file):
    """eval=risk finds the options in the test split; the last one in order is the positive one."""
    result = cruijff_kit.train_then_eval(compose(*file(*"nyynynyy"), "eval=risk", "epochs=4"))
    (entry,) = result.evaluation
    assert [*entry.metrics] == ["match", "risk_scorer"] and entry.coverage["risk_scorer"] == 1
    wanted = {"auc", "brier", "c_ece", "r_ece", "balanced_accuracy", "f1", "accuracy", "stderr", "coverage"}
    assert wanted <= set(entry.metrics["risk_scorer"]) and entry.metrics["risk_scorer"]["class_balance"] == 5 / 8
    assert result.metrics()["accuracy"] == entry.metrics["match"]["accuracy"], "what is written counts first"
    assert result.objective_name is None, "there is no validation split"
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
        assert plan_run(config).prompts_checked[task] > 0
    chosen = compose(f"dataset={dataset}", "eval=match", *(f"dataset.arguments.{k}={v}" for k, v in arguments.items()))
    assert chosen.eval.tasks == ["match"], "what the user says goes before"


def test_numbers(compose, tmp_path):
    """The base model writes none, which is no error; mae can be the objective, and its Bayes optimum is known."""
    objective = "number/continuous_scorer/mae"
    result = cruijff_kit.train_then_eval(
        compose(*CENSUS, "dataset.arguments.target=continuous", f"objective={objective}", "epochs=12")
    )
    (before,), (after,) = result.baseline, result.evaluation
    assert before.coverage == {"continuous_scorer": 0} and before.unscored == {"continuous_scorer": 20}
    assert after.coverage["continuous_scorer"] > 0 and result.objective_name == objective
    assert result.objective == after.metrics["continuous_scorer"]["mae"] > after.bayes_optimum["mae"] > 0


def test_a_trained_model_that_writes_no_number_ranks_last(compose, file, capsys):
    """The run is done: its numbers are the constant's, which is said, and a worse run is before it."""
    words = file(*"0123")
    training = [{"input": "a", "output": "b"}] * 8 + [{"input": "d", "output": "5"}]
    Path(words[1].partition("=")[2]).write_text(
        json.dumps({"train": training, "test": [{"input": f"c {n}", "output": f"{n}"} for n in range(4)]})
    )
    result = cruijff_kit.train_then_eval(compose(*words, "eval=number", "epochs=8"))
    (entry,) = result.evaluation
    assert result.status == "done" and entry.coverage == {"continuous_scorer": 0}
    assert entry.metrics["continuous_scorer"]["mae"] == entry.chance["continuous_scorer"]["mae"] == 3.5
    assert "warning: continuous_scorer could score none of the 4 answers to number" in capsys.readouterr().err
    for name, worse in (("mae", 4.5), ("continuous_scorer/rmse", 9.0), ("number/continuous_scorer/r_squared", -9.0)):
        silent = dataclasses.replace(result, objective_name=name, objective=result.metrics()[name])
        some = dataclasses.replace(entry, epoch=entry.epoch + 1, coverage={"continuous_scorer": 0.25})
        answering = dataclasses.replace(
            silent, name="answering", objective=worse, evaluation=[entry, some], configuration_hash="another"
        )
        assert analyse_briefly([silent, answering]).ranking.leader.runs == [answering], name
        assert [c.runs for c in analyse([silent, answering]).ranking.best] == [[answering]], name
    lower = dataclasses.replace(result, objective_name="validation_loss", objective=0.1)
    higher = dataclasses.replace(answering, objective_name="validation_loss", objective=0.9)
    best = analyse([lower, higher]).ranking.best
    assert [c.runs for c in best] == [[higher]], "also where the validation loss chooses"


def test_a_target_that_no_number_stands_in_is_refused_wherever_it_is(compose, file):
    """Also behind the rows that the rehearsal asks."""
    with pytest.raises(
        UserError, match=r"^eval task number cannot run: .* needs a number as target, not '5kg' \(row 40\)$"
    ):
        plan_run(compose(*file(*["7"] * 40, "5kg", "8"), "eval=number"))
    with pytest.raises(UserError, match=r"the target 'm' is none of the scorer's options: 'n', 'y' \(row 40\)$"):
        plan_run(compose(*file(*["n"] * 40, "m", "y"), "eval=risk", "eval.task_args.options=[n,y]"))


LONG = "a word and another word"


@pytest.mark.parametrize(
    ("task", "limit", "needed"),
    [("match", 22, 24), ("match", 23, 24), ("match", 24, None), ("capitalization", 8, 24), ("number", 3, 7)],
)
def test_a_target_that_is_longer_than_an_answer_may_be(compose, file, tmp_path, task, limit, needed):
    """In tokens as training teaches them, here a letter each; where only the end token has no room, that is said."""
    outputs = ["-12.50", "7", "8"] if task == "number" else ["short", LONG, "brief"]
    row = outputs.index(max(outputs, key=len))
    config = compose(*file(*outputs), f"eval.tasks=[{task}]", f"eval.max_tokens={limit}")
    says = f"eval.max_tokens={limit}: the longest target of task {task} has {needed} tokens (row {row})"
    if needed is None:
        assert plan_run(config).warnings == []
    elif limit == needed - 1:
        (warning,) = plan_run(config).warnings
        assert warning.startswith(f"{says}, the last of them its end, so that a longer answer counts as right;")
    else:
        with pytest.raises(UserError) as refused:
            cruijff_kit.train_then_eval(config)
        assert str(refused.value) == f"{says}; set eval.max_tokens={needed}" and not (tmp_path / "run").exists()
        assert plan_run(compose(*file(*outputs), f"eval.tasks=[{task}]", f"eval.max_tokens={needed}")).warnings == []


def test_what_needs_no_whole_answer(compose, file):
    """A label is one token, and a risk as a number does not depend on how long the labels are."""
    plan_run(compose(*file(*"nyynynyy"), "eval=risk", "eval.max_tokens=1"))
    plan_run(compose(*file("not at all likely", "very likely"), "eval=numeric_risk", "eval.max_tokens=4"))
    plan_run(compose(*file("short", "short", LONG), "eval=match", "eval.max_tokens=6", "eval.limit=2"))


def test_only_long_targets_are_tokenised(compose, file, monkeypatch):
    """Of many targets those that may have more tokens than an answer; of these few as training has them."""
    tokenizer = process_cache.get_tokenizer(compose(*file("a")).torchtune["tokenizer"])
    outputs, encoded = [f"word {n}" for n in range(500)] + ["x" * (30 + n) for n in range(40)], []
    task, config = TASKS["match"](data=file(*outputs)[1].partition("=")[2]), compose(*file("a"), "eval.max_tokens=200")

    class Counted:
        def __getattr__(self, name):
            return lambda *given: (encoded.append(name), getattr(tokenizer, name)(*given))[1]

    check_room(TaskName("match", "match"), task, config, Counted())
    assert encoded == []
    with pytest.raises(UserError, match=r"has 70 tokens \(row 539\); set eval.max_tokens=70"):
        check_room(TaskName("match", "match"), task, dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, max_tokens=32)), Counted())  # fmt: skip
    assert Counter(encoded) == {"encode": 40, "encode_example": 8}


OWN = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes, match

@task
def capitals(most: int | None = None, numeric: bool = False):
    targets = {"France?": "Paris", "Sri Lanka?": ["Colombo, or Kotte", "Sri Jayawardenepura"]}
    samples = [Sample(input=i, target=t) for i, t in targets.items()]
    scorer = match(numeric=True) if numeric else includes()
    return Task(dataset=samples, scorer=scorer, config=GenerateConfig(max_tokens=most))
"""


def test_a_target_of_ones_own_task_that_is_too_long(compose, file, tmp_path):
    """The shortest of a sample's targets counts."""
    (tmp_path / "own.py").write_text(OWN)
    name = f"eval.tasks=[{tmp_path / 'own.py'}@capitals]"
    with pytest.raises(
        UserError, match=r"^eval.max_tokens=9: the longest target of task capitals has 18 tokens \(sample 2\)"
    ):
        plan_run(compose(*file("a"), name, "eval.max_tokens=9"))
    with pytest.raises(UserError, match=r"^max_tokens=9: .* \(sample 2\); set max_tokens=18 in its GenerateConfig$"):
        plan_run(compose(*file("a"), name, "eval.task_args.most=9"))
    plan_run(compose(*file("a"), name, "eval.max_tokens=18"))
    plan_run(compose(*file("a"), name, "eval.max_tokens=9", "eval.task_args.numeric=true"))


@pytest.mark.parametrize(
    ("outputs", "task", "said"),
    [
        (["1", "-1", "1"], "match", ("'1'", "'-1'")), (["no", "yes", "not now"], "match", ("'no'", "'not now'")),
        (["-1", "+1"], "match", None), (["yes", "no"], "match", None), (["1", "-1"], "number", None),
        (["ab", "abc", "b"], "capitalization", ("'b'", "'ab'")), (["aa", "baab"], "match", ("'aa'", "'baab'")),
        (["aaa", "aab"], "match", None), ([f"word {n:03}" for n in range(900)], "match", None),
        ([*(f"word {n}" for n in range(300)), "d 299"], "match", ("'d 299'", "'word 299'")),
    ],
)  # fmt: skip
def test_targets_that_includes_cannot_tell_apart(compose, file, outputs, task, said):
    warnings = [w for w in plan_run(compose(*file(*outputs), f"eval.tasks=[{task}]")).warnings if "includes" in w]
    if said is None:
        assert warnings == []
        return
    one, other = said
    assert warnings == [
        f"includes cannot tell all targets of task {task} apart: {one} also stands in {other}; use match"
    ]


def test_minus_is_not_plus(compose, file):
    """Random labels that differ in punctuation alone: match and the constant say what there is."""
    labels = ["+", "-", "-", "+", "-", "+", "+", "-", "-", "-"]
    result = cruijff_kit.train_then_eval(
        compose(*file(*labels), "eval.tasks=[match]", "epochs=4", "eval.baseline=false")
    )
    (entry,) = result.evaluation
    log = read_eval_log(entry.log)
    right = [s.output.completion.strip() == s.target for s in log.samples]
    assert entry.metrics["match"]["accuracy"] == sum(right) / 10 < 1
    assert entry.chance["match"]["accuracy"] == 0.6 and entry.constant_answer == (
        len({s.output.completion.strip() for s in log.samples}) == 1
    )


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
            assert who["run"] == "base model" and who[1:].isna().all(), "nothing of the run that asked it first"
        else:
            adapter = result.training["adapters"][entry.epoch]
            assert who.tolist() == [result.name, 4, 8, entry.epoch, adapter, result.config_hash]
    assert len(frame) == 3
    samples = samples_df(str(logs), columns=[*SampleSummary, EvalColumn("cell_*", path="metadata")], quiet=True)
    last = samples[samples["cell_epoch"] == 1]
    assert (last["score_match"] == "C").mean() == result.evaluation[-1].metrics["match"]["accuracy"]
    assert last["metadata_sex"].tolist() == ["f", "m"] * 4
