"""Check each task before training: it runs, and its prompts have the same tokens as the training rows.

The task is run through inspect-ai with a recorder in the model's place, so whatever inspect-ai or the task does to a
message is in what is compared.
"""

import ast
import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessage

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation import metrics
from cruijff_kit.evaluation.build_tasks import build_task, option_tokens
from cruijff_kit.evaluation.engine import AnsweringModel, Completion, CompletionRequest, Engine, RequestScheduler
from cruijff_kit.evaluation.external_tasks import list_metrics
from cruijff_kit.evaluation.generate_config import as_messages
from cruijff_kit.evaluation.inspect_eval import run_inspect
from cruijff_kit.evaluation.provider import BatchCollector, open_model
from cruijff_kit.evaluation.targets import check_room, check_targets, most_tokens, targets_within_others
from cruijff_kit.training import process_cache
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import quote

_SAMPLES = 32  # prompts compared per task
_FEW = 2  # samples of an external task
_LONGEST = 8  # further ones, those of most letters, whose tokens are counted


class _Recorder(AnsweringModel, Engine, RequestScheduler):
    """Stands for model, engine and scheduler: answers each prompt with the number under which it was recorded."""

    num_tokens = 0
    is_busy = False

    def __init__(self, tokenizer) -> None:
        self.tokenizer: _NumberTokenizer = _NumberTokenizer(tokenizer)
        self.prompts: list[list[int]] = []

    def open_scheduler(self, chat_model: "_Recorder", max_rows: int | None = None) -> "_Recorder":
        return self

    def add(
        self,
        request: CompletionRequest,
        on_done: Callable[[Completion], object],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.prompts.append(request.ids)
        on_done(Completion([len(self.prompts) - 1], option_logits=[0.0] * len(request.options)))

    def step(self, schedulers: list["_Recorder"]) -> dict["_Recorder", Exception]:
        return {}

    def close(self) -> None:
        pass

    def release(self) -> None:
        pass


class _NumberTokenizer:
    """Encodes as the model's tokenizer; decodes an id to its number."""

    def __init__(self, tokenizer) -> None:
        self.encode_prompt, self.encode_example = tokenizer.encode_prompt, tokenizer.encode_example
        self.encode_continuation, self.id_to_token = tokenizer.encode_continuation, tokenizer.id_to_token

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


@dataclass(frozen=True)
class PromptCheck:
    """Result of a task's dry run."""

    num_compared: int
    """Prompts that were compared with training."""
    longest: int
    """Tokens of the longest prompt."""
    metrics: dict[str, list[str]] | None
    """Scorer -> its metrics; None where they are not known before the task has run."""
    max_tokens: int
    """Tokens of the longest answer."""
    num_samples: int
    """Number of samples of the evaluation."""
    warnings: tuple[str, ...] = ()
    """Warnings about the scorers, for before training."""


_checks: dict[str, PromptCheck] = {}


def check_prompts(name: TaskName, config: RunConfig, data_hash: str) -> PromptCheck:
    """Run a task without the model and compare its prompts with the same rows as training would read them.

    Once per process for the same task, data, prompts and tokenizer: ranks and learning rates change no prompt.

    Raises:
        UserError: as `_check_own`.
    """
    nodes = [config.torchtune["dataset"], config.torchtune["tokenizer"]]
    settings = [dataclasses.asdict(config.dataset), dataclasses.asdict(config.eval), config.model.name, data_hash]
    key = json.dumps([str(name), nodes, settings], sort_keys=True)
    if key not in _checks:
        _checks[key] = _check_own(name, config) if name.ships else _check_external(name, config)
    return _checks[key]


def _check_own(name: TaskName, config: RunConfig) -> PromptCheck:
    """Check a task that ships.

    Raises:
        UserError: a prompt differs (its row and the first differing tokens are shown), or as `targets`.
    """
    tokenizer = process_cache.get_tokenizer(config.torchtune["tokenizer"])
    rows = {
        "split": name.split or config.dataset.test_split,
        "max_samples": config.dataset.max_test_samples,
        "first": _SAMPLES,
    }
    dataset = config.torchtune["dataset"] | rows | {"train_on_input": False, "train_on_last": True, "packed": False}
    examples = {e.row: e for e in process_cache.get_dataset(dataset, config.torchtune["tokenizer"])}
    recorder = _Recorder(tokenizer)
    task = build_task(name, config)
    longest_samples, num_samples = _find_longest(task, config), _count_samples(task, config)
    check_targets(name, task, config)
    warnings = (*check_room(name, task, config, tokenizer), *targets_within_others(name, task))
    task.dataset = task.dataset[:_SAMPLES]
    with tempfile.TemporaryDirectory() as logs:  # inspect-ai reads samples from the file when they are used
        log = _run(name, task, recorder, config, Path(logs))
        scorers = {s.name: list(s.metrics) for s in log.results.scores}
        prompts = {s.metadata["row"]: recorder.prompts[int(s.output.completion)] for s in log.samples}
    for row, prompt in prompts.items():
        example = examples[row]
        _compare(name.label, row, prompt, example.tokens[: example.first_label], tokenizer)
    longest = max(
        map(len, [*prompts.values(), *(tokenizer.encode_prompt(_messages(s.input)) for s in longest_samples)])
    )
    return PromptCheck(len(prompts), longest, scorers, most_tokens(task, config), num_samples, warnings)


def _check_external(name: TaskName, config: RunConfig) -> PromptCheck:
    """Run a few samples of an external task without its scorer: its prompts are its own, but it must run."""
    tokenizer = process_cache.get_tokenizer(config.torchtune["tokenizer"])
    recorder = _Recorder(tokenizer)
    task = build_task(name, config)
    longest_prompts = [tokenizer.encode_prompt(_messages(s.input)) for s in _find_longest(task, config)]
    scorers, num_samples = list_metrics(task), _count_samples(task, config)
    warnings = check_room(name, task, config, tokenizer)
    task.dataset = task.dataset[:_FEW]
    with tempfile.TemporaryDirectory() as logs:
        _run(name, task, recorder, config, Path(logs), score=False)
    longest = max(map(len, [*recorder.prompts, *longest_prompts]))
    return PromptCheck(0, longest, scorers, most_tokens(task, config), num_samples, warnings)


def _run(name: TaskName, task: Task, recorder: _Recorder, config: RunConfig, logs: Path, score: bool = True) -> EvalLog:
    logger = logging.getLogger(metrics.__name__)
    was, logger.disabled = logger.disabled, True  # a metric that the recorder's answers do not define means nothing
    try:
        model = open_model(
            recorder, "recorder", _SAMPLES, collector=BatchCollector(recorder), options=option_tokens(task)
        )
        log = run_inspect(task, model, config, logs, {}, score)
    except Exception as error:  # whatever a task of the user's does wrong
        raise UserError(f"eval task {name} cannot run: {type(error).__name__}: {one_line(error)}") from error
    finally:
        logger.disabled = was
    if log.status != "success":
        why = _error_text(log.error.message, log.error.traceback) if log.error else log.status
        raise UserError(f"eval task {name} cannot run: {why}")
    return log


def _show_tokens(ids: list[int], tokenizer) -> str:
    return quote(ids) if redaction.is_enabled() else f"{tokenizer.decode(ids, skip_special_tokens=False)!r} {ids[:4]}"


def _error_text(message: str, trace: str) -> str:
    """Return an error of a log in one line; one of ours without its type and quotes."""
    if redaction.is_enabled():
        return redaction.redact_log(message, trace)
    user_error = re.fullmatch(r"UserError\((.*)\)", one_line(message))
    return str(ast.literal_eval(user_error[1])) if user_error else one_line(message)


def _find_longest(task: Task, config: RunConfig) -> list[Sample]:
    """Find the samples with most letters."""
    return sorted(task.dataset[: config.eval.limit], key=lambda s: len(str(s.input)))[-_LONGEST:]


def _count_samples(task: Task, config: RunConfig) -> int:
    """Return the number of samples of the task, times its number of epochs."""
    return len(task.dataset[: config.eval.limit]) * (task.epochs or 1)


def _messages(input: str | list[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": "user", "content": input}] if isinstance(input, str) else as_messages(input)


def _compare(name: str, row: int, prompt: list[int], trained: list[int], tokenizer) -> None:
    if prompt == trained:
        return
    at = next(
        (i for i, (a, t) in enumerate(zip(prompt, trained, strict=False)) if a != t), min(len(prompt), len(trained))
    )
    raise UserError(
        f"eval task {name} uses other prompt tokens for row {row} than training: from token {at} on, evaluation has "
        f"{_show_tokens(prompt[at : at + 8], tokenizer)}, training has {_show_tokens(trained[at : at + 8], tokenizer)}; "
        "make dataset.prompt and dataset.system_prompt agree with torchtune.dataset"
    )
