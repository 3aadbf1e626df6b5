"""Cells (run x epoch x task): tasks of the user's and of packages, their arguments, several epochs and splits; refusals."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from inspect_ai.log import read_eval_log

import cruijff_kit
from cruijff_kit.config.task_names import TaskName, parse_task_name
from cruijff_kit.evaluation.log_checks import EvaluationError
from cruijff_kit.records.result import read_result
from cruijff_kit.util.errors import UserError

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-2", "lora.rank=4", "device=cpu", "dtype=fp32",
         "eval.limit=6", "eval.max_tokens=6"]  # fmt: skip

SUMS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, match, mean, scorer, stderr
from inspect_ai.solver import generate
from helper import NUMBERS

@task
def sums(most: int = 8, plus: int = 1):
    samples = [Sample(input=f"{n} + {plus} =", target=str(n + plus)) for n in NUMBERS[:most]]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match())

@scorer(metrics=[mean(), stderr()])
def length():
    async def score(state, target):
        return Score(value=len(state.output.completion))
    return score

@task
def lengths(text):
    return Task(dataset=[Sample(input=text, target="")], solver=generate(), scorer=length())

@scorer(metrics=[mean()])
def some(number: int):
    async def score(state, target):
        n = int(state.input_text.split()[0])
        return Score(value=1.0) if n < number else Score.unscored(reason="too large")
    return score

@task
def partly(number: int = 4):
    samples = [Sample(input=f"{n} is", target="") for n in NUMBERS]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=some(number))
"""


@pytest.fixture
def sums(tmp_path) -> str:
    """A file of the user's with tasks, and a module of theirs beside it."""
    folder = tmp_path / "my tasks"
    folder.mkdir()
    (folder / "helper.py").write_text("NUMBERS = list(range(10))\n")
    (folder / "sums.py").write_text(SUMS)
    return str(folder / "sums.py")


@pytest.fixture
def compose(tiny, tmp_path):
    def made(*overrides: str, name: str = "run"):
        where = [f"output_dir={tmp_path / name}", "model=hf_llama", f"model.path={tiny}"]
        return cruijff_kit.compose([*where, *SMALL, *overrides])

    return made


def failed(config) -> dict:
    written = json.loads((Path(config.output_dir) / "result.json").read_text())
    assert written["status"] == "failed"
    return written["error"]


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_task_name("match") == TaskName("match", "match") == parse_task_name("cruijff_kit/match")
    assert parse_task_name("match@validation") == TaskName("match@validation", "match", split="validation")
    assert parse_task_name("a/b.py@c") == TaskName("c", "c", file=tmp_path / "a" / "b.py")
    assert parse_task_name("some_evals/hard") == TaskName("hard", "some_evals/hard")
    for entry in ("match", "match@validation", "a/b.py@c", "some_evals/hard"):
        assert parse_task_name(str(parse_task_name(entry))) == parse_task_name(entry)
    assert [parse_task_name(e).ships for e in ("match@x", "b.py@c", "p/q")] == [True, False, False]


def test_tasks_of_ones_own_beside_ours(compose, sums):
    """Two tasks of a file and one of ours: a log each, arguments as given, entries with their counts."""
    arguments = "eval.task_args={sums: {most: 3, plus: 2}, lengths: {text: Hello}}"
    result = cruijff_kit.train_then_eval(
        compose(f"eval.tasks=[capitalization,'{sums}@sums','{sums}@lengths']", arguments)
    )
    assert [(e.task, e.epoch, e.samples) for e in result.evaluation] == [
        ("capitalization", 0, 6), ("sums", 0, 3), ("lengths", 0, 1),
    ]  # fmt: skip
    assert [e.prompts_checked for e in result.evaluation] == [6, 0, 0]
    ours, theirs, length = result.evaluation
    assert ours.bayes_optimum == {"accuracy": 1.0} and theirs.bayes_optimum == {}
    assert theirs.coverage == {"match": 1.0} and theirs.unscored == {"match": 0}
    log = read_eval_log(theirs.log)
    assert [s.input for s in log.samples] == ["0 + 2 =", "1 + 2 =", "2 + 2 ="]
    assert log.eval.task_args == {"most": 3, "plus": 2}
    meta = log.eval.metadata
    assert meta["base_model"] and meta["config_hash"] == result.config_hash and meta["data_hash"] == result.data_hash
    assert meta["rank"] == 4 and meta["epoch"] == 0 and meta["task"] == f"{sums}@sums"
    assert length.metrics["length"]["mean"] > 0
    assert {"sums/match/accuracy", "lengths/length/mean"} <= set(result.metrics())
    assert result.objective_name == "validation_loss" and {e.split for e in result.evaluation} == {"test"}


def test_a_data_set_is_not_asked_for_a_split_that_no_task_asks(compose, sums, tmp_path):
    (tmp_path / "only.json").write_text(json.dumps({"train": [{"input": f"{n}", "output": "x"} for n in range(9)]}))
    where = ["dataset=files", f"dataset.path={tmp_path / 'only.json'}", "dataset.validation_split=null"]
    config = compose(*where, f"eval.tasks=['{sums}@lengths']", "eval.task_args.text=Hello")
    result = cruijff_kit.train_then_eval(config)
    assert result.objective_name is None and result.evaluation[0].metrics["length"]["mean"] > 0


def test_a_task_that_leaves_samples_unscored_says_how_many(compose, sums):
    result = cruijff_kit.train_then_eval(compose(f"eval.tasks=['{sums}@partly']"))
    (entry,) = result.evaluation
    assert (entry.samples, entry.unscored, entry.coverage) == (6, {"some": 2}, {"some": pytest.approx(4 / 6)})
    assert entry.metrics == {"some": {"mean": 1.0}}, "the mean is over what was scored"


@pytest.mark.parametrize("baseline", ["true", "false"])
def test_a_task_that_scores_nothing_fails_the_run(compose, sums, baseline):
    config = compose(f"eval.tasks=['{sums}@partly']", "eval.task_args.number=0", f"eval.baseline={baseline}")
    with pytest.raises(EvaluationError, match="task partly: scorer some scored 0 of 6 samples"):
        cruijff_kit.train_then_eval(config)
    assert "scored 0 of 6" in failed(config)["message"]


NOTHING = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import NOANSWER, Score, accuracy, mean, scorer, stderr

VALUES = {"N": NOANSWER, "NaN": float("nan"), "one": {"a": float("nan"), "b": 1.0}}

def scores(kind):
    async def score(state, target):
        if kind == "unscored":
            return Score.unscored(reason="too hard")
        return Score(value=VALUES[kind], explanation="cannot tell")
    return score

@scorer(metrics=[accuracy(), stderr()])
def judge(kind):
    return scores(kind)

@scorer(metrics={"a": [mean()], "b": [mean()]})
def judges(kind):
    return scores(kind)

@task
def judged(kind, count: int = 4):
    samples = [Sample(input=f"{n}", target="x") for n in range(count)]
    return Task(dataset=MemoryDataset(samples), scorer=judges(kind) if kind == "one" else judge(kind))
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("N", "scorer judge scored 0 of 4 samples; the first: cannot tell"),
        ("NaN", "scorer judge scored 0 of 4 samples; the first: cannot tell"),
        ("unscored", "scorer judge scored 0 of 4 samples; the first: too hard"),
        ("one", "scorer a scored 0 of 4 samples; the first: cannot tell"),
    ],
)
def test_a_scorer_that_gives_no_score_fails_the_run_and_says_why(compose, tmp_path, kind, says):
    (tmp_path / "judged.py").write_text(NOTHING)
    config = compose(
        f"eval.tasks=[{tmp_path}/judged.py@judged]", f"eval.task_args.kind='{kind}'", "eval.baseline=false"
    )
    with pytest.raises(EvaluationError, match=f"task judged: {says}"):
        cruijff_kit.train_then_eval(config)
    assert failed(config)["phase"] == "evaluate"


def test_a_task_without_samples_is_refused_before_training(compose, tmp_path):
    (tmp_path / "judged.py").write_text(NOTHING)
    config = compose(f"eval.tasks=[{tmp_path}/judged.py@judged]", "eval.task_args={kind: N, count: 0}")
    with pytest.raises(UserError, match="judged cannot be built: ValueError: .* dataset is empty"):
        cruijff_kit.train_then_eval(config)
    assert not (tmp_path / "run").exists()


def test_the_base_model_answers_again_when_a_task_changes(compose, sums):
    def cached(name: str, *more: str) -> bool:
        config = compose(f"eval.tasks=['{sums}@sums']", *more, name=name)
        return cruijff_kit.train_then_eval(config).baseline[0].cached

    assert [cached("a"), cached("b"), cached("c", "eval.task_args.plus=5")] == [False, True, False]
    helper = Path(sums).with_name("helper.py")
    helper.write_text(helper.read_text() + "# changed\n")
    assert not cached("d")


def test_a_run_whose_task_was_edited_is_another_run(compose, sums):
    from cruijff_kit.config.identity import config_hash

    config = compose(f"eval.tasks=['{sums}@sums']")
    before = config_hash(config)
    assert before == config_hash(compose(f"eval.tasks=['{sums}@sums']"))
    Path(sums).write_text(SUMS + "# edited\n")
    assert config_hash(config) != before


def test_a_task_that_asks_each_sample_twice(compose, sums):
    Path(sums).write_text(SUMS.replace("scorer=match())", "scorer=match(), epochs=2)"))
    (entry,) = cruijff_kit.train_then_eval(compose(f"eval.tasks=['{sums}@sums']")).evaluation
    assert entry.samples == 12 and entry.coverage == {"match": 1.0}


REFUSED = [
    ("eval.tasks=['{sums}']", r"name the task in it: .*sums.py@TASK"),
    ("eval.tasks=['{sums}@sum']", r"sums.py has no task sum; did you mean sums\?"),
    ("eval.tasks=[nowhere.py@sums]", r"no such file .*nowhere.py"),
    ("eval.tasks=['{sums}@lengths']", r"task lengths needs the argument text; add eval.task_args.text=VALUE"),
    ("eval.tasks=['{sums}@sums'] eval.task_args.mots=3", r"task sums takes no argument mots; did you mean most\?"),
    (
        "eval.tasks=['{sums}@sums'] eval.task_args.most=many",
        r"sums cannot be built: TypeError: .*slice indices.* \(line 10\)",
    ),
    (
        "eval.tasks=['{sums}@sums'] eval.task_args.most=0",
        "cannot be built: ValueError: .* dataset is empty",
    ),
    ("eval.tasks=['{sums}@sums','{sums}@sums']", "two tasks that are called sums"),
    ("eval.tasks=[capitalization] eval.task_args.prompt=x", "task capitalization takes no argument prompt"),
    ("eval.tasks=[no_such_evals/hard]", "no_such_evals/hard is not installed"),
    ("eval.tasks=[cruijff_kit/mach]", r"mach does not exist; did you mean match\?"),
    ("eval.tasks=[match@tset]", r"has no split 'tset'; did you mean test\?"),
    ("eval.tasks=[match@train]", r"eval.tasks: split train is the training split"),
    ("eval.tasks=['match@']", "write NAME, NAME@SPLIT, FILE.py@TASK or PACKAGE/TASK"),
    ("eval.epochs=some", r"eval.epochs=some is not last, all or a list of epochs"),
    ("eval.epochs=all epochs_to_save=none", "leaves nothing to evaluate with epochs_to_save=none"),
    ("eval.epochs=[]", "leaves nothing to evaluate"),
    ("eval.epochs=[0] epochs=3 epochs_to_save=[1]", "epoch 0 is not saved"),
    ("eval.epochs=[0,3] epochs=3", "epoch 3 is not saved"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=str)
def test_refused_before_training_in_one_line(compose, sums, tmp_path, overrides, says):
    parts = [p.format(sums=sums) for p in overrides.split(" ")]
    with pytest.raises(UserError, match=says) as refused:
        cruijff_kit.train_then_eval(compose(*parts))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import no_such_module", r"broken cannot be imported: ModuleNotFoundError: No module .* \(line 2\)"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit('no key')", r"cannot be imported: SystemExit: no key \(line 2\)"),
        ("@task\ndef broken():\n    return Task(dataset=json_dataset('gone.jsonl'))",
         "cannot be built: FileNotFoundError: .*gone.jsonl"),
        ("@task\ndef broken():\n    return Task(dataset=[Sample(input='a')], solver=use_tools(clock()))",
         "cannot call tools"),
        ("def other(): pass", "has no task broken; it has no function under @task"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_before_training(compose, tmp_path, body, says):
    tool = """
        from inspect_ai.solver import generate
        from inspect_ai.tool import tool
        @tool
        def clock():
            async def execute():
                'Tell the time.'
                return 'noon'
            return execute
        def use_tools(t):
            from inspect_ai.solver import chain, use_tools
            return chain(use_tools(t), generate())
    """
    head = "from inspect_ai import Task, task; from inspect_ai.dataset import Sample, json_dataset\n"
    (tmp_path / "broken.py").write_text(head + body + "\n" + (textwrap.dedent(tool) if "clock" in body else ""))
    with pytest.raises(UserError, match=says) as refused:
        cruijff_kit.train_then_eval(compose(f"eval.tasks=[{tmp_path / 'broken.py'}@broken]"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_task_of_an_installed_package(run_cli, tiny, tmp_path):
    """Found by its entry point, as inspect-ai finds it."""
    package = tmp_path / "site" / "polite_evals"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\nfrom inspect_ai.scorer import includes\n"
        "@task\ndef greeting(to='you'):\n"
        "    return Task(dataset=[Sample(input=f'Hello {to}', target='x')], scorer=includes())\n"
    )
    about = tmp_path / "site" / "polite_evals-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: polite_evals\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[inspect_ai]\npolite_evals = polite_evals\n")
    # An editable install, as far as inspect-ai looks.
    (about / "top_level.txt").write_text("polite_evals\n")
    (about / "direct_url.json").write_text(json.dumps({"url": f"file://{package}", "dir_info": {"editable": True}}))
    settings = [
        *SMALL,
        "model=hf_llama",
        f"model.path={tiny}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "eval.task_args.to=Ann",
    ]
    where = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "site")}
    done = run_cli(*settings, "eval.tasks=[polite_evals/greeting]", **where)
    assert done.returncode == 0, done.stderr
    (entry,) = read_result(tmp_path / "run" / "result.json").evaluation
    assert entry.task == "greeting" and [s.input for s in read_eval_log(entry.log).samples] == ["Hello Ann"]
    settings[-2] = f"hydra.run.dir={tmp_path / 'other'}"
    refused = run_cli(*settings, "eval.tasks=[polite_evals/meeting]", **where)
    assert refused.returncode == 2 and "polite_evals has no task meeting; did you mean greeting?" in refused.stderr


def test_epochs_and_splits(compose, tmp_path):
    """Every saved epoch, two splits: each answered by its own adapter, as a run of that many epochs would be."""
    more = ["dataset.arguments.other_lengths=[4]", "lr_scheduler=constant"]
    tasks = "eval.tasks=[capitalization,capitalization@test_4L]"
    result = cruijff_kit.train_then_eval(compose("epochs=3", "epochs_to_save=[0,2]", "eval.epochs=all", tasks, *more))
    assert [(e.epoch, e.task) for e in result.evaluation] == [
        (epoch, task) for task in ("capitalization", "capitalization@test_4L") for epoch in (0, 2)
    ]
    assert len({e.log for e in result.evaluation}) == 4 and len(result.baseline) == 2
    assert result.metrics()["capitalization/match/accuracy"] == result.evaluation[1].metrics["match"]["accuracy"]
    logs = [read_eval_log(e.log) for e in result.evaluation]
    assert [log.eval.metadata["epoch"] for log in logs] == [0, 2, 0, 2]
    assert logs[0].eval.metadata["adapter"] == result.training["adapters"][0]
    assert {len(s.input[-1].text.rpartition(" ")[2]) for s in logs[2].samples} == {4}
    one = cruijff_kit.train_then_eval(compose("epochs=1", tasks, *more, name="one"))
    assert one.evaluation[0].metrics == result.evaluation[0].metrics
    answers = [[s.output.completion for s in read_eval_log(r.evaluation[0].log).samples] for r in (one, result)]
    assert answers[0] == answers[1]
    assert answers[0] != [s.output.completion for s in logs[1].samples], "the adapters differ enough to be told apart"


def test_a_missing_adapter_fails_the_run(compose, monkeypatch):
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice as Recipe

    save_checkpoint = Recipe.save_checkpoint

    def lose(recipe) -> None:
        save_checkpoint(recipe)
        shutil.rmtree(recipe.folder.epoch(0), ignore_errors=True)

    monkeypatch.setattr(Recipe, "save_checkpoint", lose)
    config = compose("epochs=2", "eval.epochs=all")
    with pytest.raises(EvaluationError, match="the adapter of epoch 0 is missing"):
        cruijff_kit.train_then_eval(config)
    assert failed(config)["phase"] == "evaluate"


@pytest.mark.parametrize("dora", ["true", "false"])
def test_an_adapter_comes_back_from_its_folder_bit_for_bit(set_up_recipe, tiny, tmp_path, dora):
    from cruijff_kit.models.adapter import adapter_state, load_adapter, save_adapter

    recipe = set_up_recipe(
        "model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path / 'run'}", "lora.rank=3", f"lora.use_dora={dora}",
        "lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "dataset.max_samples=16", "num_warmup_steps=0",
    )  # fmt: skip
    for p in recipe.trainable:
        torch.nn.init.normal_(p)
    before = adapter_state(recipe.model)
    save_adapter(recipe.model, recipe.cfg["model"], str(tiny), tmp_path / "adapter")
    for p in recipe.trainable:
        torch.nn.init.zeros_(p)
    load_adapter(recipe.model, tmp_path / "adapter")
    after = adapter_state(recipe.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(FileNotFoundError):
        load_adapter(recipe.model, tmp_path / "nowhere")
    recipe.cleanup()
