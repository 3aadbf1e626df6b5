"""Evaluation as a run does it: complete logs, refusals before training, failures that are failures, a cached baseline."""

import json
from pathlib import Path

import pytest
from inspect_ai import Task, task
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, accuracy, match, scorer
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import tool

import cruijff_kit
from cruijff_kit.evaluation.log_checks import EvaluationError
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.evaluation.tasks.common import answers_task
from cruijff_kit.models.tokenizer import ChatTokenizer
from cruijff_kit.util.errors import UserError

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-3", "lora.rank=4", "device=cpu", "dtype=fp32",
         "eval.limit=20"]  # fmt: skip


@pytest.fixture
def compose(tiny, tmp_path):
    def made(name: str = "run", *overrides: str):
        where = [f"output_dir={tmp_path / name}"]
        return cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", *where, *SMALL, *overrides])

    return made


def failing_result(config) -> dict:
    return json.loads((config_dir(config) / "result.json").read_text())


def config_dir(config) -> Path:
    return Path(config.output_dir)


@pytest.fixture
def with_task(monkeypatch):
    """Puts a task of the test's own among those that ship, as a later module in tasks/ would be."""

    def add(name: str, **changes):
        @task(name=name)
        def made(**arguments) -> Task:
            built = answers_task(**arguments)
            for key, value in changes.items():
                setattr(built, key, value)
            return built

        monkeypatch.setitem(TASKS, name, made)

    return add


def test_a_log_is_an_ordinary_eval_log(compose, tiny):
    config = compose("run", "eval.logprobs=true", "eval.top_logprobs=2")
    result = cruijff_kit.train_then_eval(config)
    (entry,) = result.evaluation
    log = read_eval_log(entry.log)
    assert log.status == "success" and len(log.samples) == entry.samples == 20
    meta = log.eval.metadata
    assert meta["config_hash"] == result.config_hash and meta["data_hash"] == result.data_hash
    assert (meta["rank"], meta["alpha"], meta["epoch"]) == (4, 8.0, 0) and meta["run"] == config.run_name
    assert meta["adapter"] == result.training["adapters"][0]
    assert meta["base_model"] == str(tiny) and log.eval.model == f"cruijff_kit/{config.model.name}"
    scores = {s.name: s.metrics["accuracy"].value for s in log.results.scores}
    assert scores == {name: values["accuracy"] for name, values in entry.metrics.items()}
    assert set(scores) == {"match", "includes"} and all("stderr" in m for m in entry.metrics.values())


def test_usage_is_counted_in_tokens(compose, tiny):
    log = read_eval_log(cruijff_kit.train_then_eval(compose("run", "eval.logprobs=true")).evaluation[0].log)
    tokenizer = ChatTokenizer(str(tiny))
    for sample in log.samples:
        chat = [{"role": m.role, "content": m.text} for m in sample.input]
        choice, usage = sample.output.choices[0], sample.output.usage
        assert usage.input_tokens == len(tokenizer.encode_prompt(chat))
        assert usage.output_tokens == len(choice.logprobs.content)
        stopped = choice.stop_reason == "stop"
        assert usage.output_tokens == len(tokenizer.encode(sample.output.completion)) + stopped
    assert sum(u.total_tokens for u in log.stats.model_usage.values()) == sum(
        s.output.usage.total_tokens for s in log.samples
    )


def test_base_model_is_evaluated_once(compose):
    first = cruijff_kit.train_then_eval(compose("a", "eval.limit=7"))
    again = cruijff_kit.train_then_eval(compose("b", "eval.limit=7", "lora.rank=8", "lr=1e-4"))
    other = cruijff_kit.train_then_eval(compose("c", "eval.limit=7", "eval.max_tokens=7"))
    assert [r.baseline[0].cached for r in (first, again, other)] == [False, True, False]
    assert again.baseline[0].metrics == first.baseline[0].metrics
    assert read_eval_log(again.baseline[0].log).eval.metadata["adapter"] is None
    assert again.baseline[0].log.startswith(again.paths["run"]), "the log is copied into the run's folder"
    assert cruijff_kit.train_then_eval(compose("d", "eval.limit=7", "eval.baseline=false")).baseline == []


def test_eval_none_trains_only(compose):
    result = cruijff_kit.train_then_eval(compose("run", "eval=none"))
    assert result.evaluation == result.baseline == []
    assert result.objective == result.training["validation_loss"] and result.objective_name == "validation_loss"


def test_prompts_are_compared_with_training(compose):
    assert cruijff_kit.train_then_eval(compose()).evaluation[0].prompts_checked == 20


@pytest.mark.parametrize(
    "override",
    ["torchtune.dataset.prompt='Capitalise the word: {input}'", "torchtune.dataset.system_prompt='Be terse.'"],
)
def test_a_prompt_that_training_words_otherwise_is_refused(compose, override):
    config = compose("run", override)
    with pytest.raises(UserError, match=r"prompt tokens for row 0 than training: from token \d+ on"):
        cruijff_kit.train_then_eval(config)
    assert not config_dir(config).exists(), "nothing was started"


def test_a_task_that_words_its_prompt_otherwise_is_refused(compose, with_task):
    with_task("wordy", solver=[system_message("Answer at once."), generate()])
    with pytest.raises(UserError, match="wordy uses other prompt tokens for row 0"):
        cruijff_kit.train_then_eval(compose("run", "eval.tasks=[wordy]"))


@tool
def clock():
    async def execute() -> str:
        """Tell the time."""
        return "noon"

    return execute


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": GenerateConfig(best_of=3)}, "does not support best_of"),
        ({"config": GenerateConfig(num_choices=3)}, "greedy choices would all be the same"),
        ({"solver": [use_tools(clock()), generate()]}, "cannot call tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_training(compose, with_task, changes, named):
    with_task("asks_too_much", **changes)
    config = compose("run", "eval.tasks=[asks_too_much]")
    with pytest.raises(UserError, match=named):
        cruijff_kit.train_then_eval(config)
    assert not config_dir(config).exists()


@scorer(metrics=[accuracy()])
def raises_on_words():
    async def score(state, target):
        if state.output.completion.isdigit():  # the rehearsal's answers are numbers
            return Score(value="C")
        raise RuntimeError("this scorer is broken")

    return score


@scorer(metrics=[accuracy()])
def scores_none():
    async def score(state, target):
        return Score(value="C") if state.output.completion.isdigit() else None

    return score


@pytest.mark.parametrize("baseline", ["true", "false"])
@pytest.mark.parametrize(("broken", "why"), [(raises_on_words, "this scorer is broken"), (scores_none, "0 of 20")])
def test_an_error_in_evaluation_fails_the_run(compose, with_task, broken, why, baseline):
    with_task("broken", scorer=[broken()])
    config = compose("run", "eval.tasks=[broken]", f"eval.baseline={baseline}")
    with pytest.raises(EvaluationError, match=why):
        cruijff_kit.train_then_eval(config)
    written = failing_result(config)
    assert written["status"] == "failed" and written["finished"]
    assert written["error"]["phase"] == ("baseline" if baseline == "true" else "evaluate")
    assert why in written["error"]["message"] and "Traceback" in written["error"]["traceback"]


def test_two_tasks_two_logs(compose, with_task):
    with_task("begins", scorer=[match(location="begin")])
    result = cruijff_kit.train_then_eval(compose("run", "eval.tasks=[capitalization,begins]"))
    assert [e.task for e in result.evaluation] == ["capitalization", "begins"]
    assert len({e.log for e in result.evaluation + result.baseline}) == 4
    assert {"capitalization/match/accuracy", "begins/match/accuracy", "accuracy"} <= set(result.metrics())
