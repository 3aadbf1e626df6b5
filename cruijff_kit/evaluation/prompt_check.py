"""A rehearsal of each task before anything is trained: it runs, and asks in the very tokens that training teaches.

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
from cruijff_kit.evaluation.engine import Answer, Request
from cruijff_kit.evaluation.external_tasks import measured
from cruijff_kit.evaluation.generate_config import as_messages
from cruijff_kit.evaluation.provider import open_model
from cruijff_kit.evaluation.run_tasks import build_task, option_tokens, run_inspect
from cruijff_kit.evaluation.targets import check_room, check_targets, most_tokens, targets_within_others
from cruijff_kit.training import process_cache
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import quoted

_SAMPLES = 32  # prompts compared per task
_FEW = 2  # samples of a task that is not ours
_WORDIEST = 8  # further ones, those of most letters, whose tokens are counted


class _Recorder:
    """Stands where the model stands: answers each prompt with the number under which it was recorded."""

    tokens = 0

    def __init__(self, tokenizer) -> None:
        self.tokenizer: _NumberTokenizer = _NumberTokenizer(tokenizer)
        self.prompts: list[list[int]] = []

    def session(self, most_rows: int | None) -> "_Recorder":
        return self

    def add(self, request: Request, done: Callable[[Answer], object], wanted: Callable[[], bool]) -> None:
        self.prompts.append(request.ids)
        done(Answer([len(self.prompts) - 1], option_logits=[0.0] * len(request.options)))

    def step(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def release(self) -> None:
        pass


class _NumberTokenizer:
    """Encodes as the model's tokenizer; decodes an id to its number."""

    def __init__(self, tokenizer) -> None:
        self.prompt, self.example, self.token = tokenizer.prompt, tokenizer.example, tokenizer.token
        self.continuation = tokenizer.continuation

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


@dataclass(frozen=True)
class Rehearsal:
    """What a task did with the recorder.

    prompts: how many were compared with training. longest: tokens of the longest one. metrics: scorer -> its metrics; None
    where they are not known before the task has run. max_tokens: the longest answer. samples: how many will be asked.
    warnings: what to know of the scorers before anything is trained.
    """

    prompts: int
    longest: int
    metrics: dict[str, list[str]] | None
    max_tokens: int
    samples: int
    warnings: tuple[str, ...] = ()


_rehearsed: dict[str, Rehearsal] = {}


def rehearse(name: TaskName, config: RunConfig, data_hash: str) -> Rehearsal:
    """Run a task without the model and compare its prompts with the same rows as training would read them.

    Once per process for the same task, data, prompts and tokenizer: ranks and learning rates change no prompt.

    Raises:
        UserError: as `_rehearse`.
    """
    nodes = [config.torchtune["dataset"], config.torchtune["tokenizer"]]
    settings = [dataclasses.asdict(config.dataset), dataclasses.asdict(config.eval), config.model.name, data_hash]
    key = json.dumps([str(name), nodes, settings], sort_keys=True)
    if key not in _rehearsed:
        _rehearsed[key] = _rehearse(name, config) if name.ships else _rehearse_foreign(name, config)
    return _rehearsed[key]


def _rehearse(name: TaskName, config: RunConfig) -> Rehearsal:
    """As `rehearse`, without its memory.

    Raises:
        UserError: a prompt differs (its row and the first differing tokens are shown), or as `targets`.
    """
    tokenizer = process_cache.tokenizer(config.torchtune["tokenizer"])
    asked = {
        "split": name.split or config.dataset.test_split,
        "max_samples": config.dataset.max_test_samples,
        "first": _SAMPLES,
    }
    taught = config.torchtune["dataset"] | asked | {"train_on_input": False, "train_on_last": True, "packed": False}
    examples = {e.row: e for e in process_cache.dataset(taught, config.torchtune["tokenizer"])}
    recorder = _Recorder(tokenizer)
    task = build_task(name, config)
    wordiest, samples = _wordiest(task, config), _asked(task, config)
    check_targets(name, task, config)
    warnings = (*check_room(name, task, config, tokenizer), *targets_within_others(name, task))
    task.dataset = task.dataset[:_SAMPLES]
    with tempfile.TemporaryDirectory() as logs:  # inspect-ai reads samples from the file when they are asked for
        log = _run(name, task, recorder, config, Path(logs))
        found = {s.name: list(s.metrics) for s in log.results.scores}
        asked = {s.metadata["row"]: recorder.prompts[int(s.output.completion)] for s in log.samples}
    for row, prompt in asked.items():
        example = examples[row]
        _compare(name.label, row, prompt, example.tokens[: example.first_label], tokenizer)
    longest = max(map(len, [*asked.values(), *(tokenizer.prompt(_messages(s.input)) for s in wordiest)]))
    return Rehearsal(len(asked), longest, found, most_tokens(task, config), samples, warnings)


def _rehearse_foreign(name: TaskName, config: RunConfig) -> Rehearsal:
    """Run a few samples of a task that is not ours, without its scorer: it asks what it likes, but it must run."""
    tokenizer = process_cache.tokenizer(config.torchtune["tokenizer"])
    recorder = _Recorder(tokenizer)
    task = build_task(name, config)
    wordiest = [tokenizer.prompt(_messages(s.input)) for s in _wordiest(task, config)]
    found, samples = measured(task), _asked(task, config)
    warnings = check_room(name, task, config, tokenizer)
    task.dataset = task.dataset[:_FEW]
    with tempfile.TemporaryDirectory() as logs:
        _run(name, task, recorder, config, Path(logs), score=False)
    longest = max(map(len, [*recorder.prompts, *wordiest]))
    return Rehearsal(0, longest, found, most_tokens(task, config), samples, warnings)


def _run(name: TaskName, task: Task, recorder: _Recorder, config: RunConfig, logs: Path, score: bool = True) -> EvalLog:
    said = logging.getLogger(metrics.__name__)
    was, said.disabled = said.disabled, True  # what is not defined over the recorder's answers says nothing
    try:
        model = open_model(recorder, "recorder", _SAMPLES, options=option_tokens(task))
        log = run_inspect(task, model, config, logs, {}, score)
    except Exception as error:  # whatever a task of the user's does wrong
        raise UserError(f"eval task {name} cannot run: {type(error).__name__}: {one_line(error)}") from error
    finally:
        said.disabled = was
    if log.status != "success":
        why = _plain(log.error.message, log.error.traceback) if log.error else log.status
        raise UserError(f"eval task {name} cannot run: {why}")
    return log


def _shown(ids: list[int], tokenizer) -> str:
    return quoted(ids) if redaction.active() else f"{tokenizer.decode(ids, skip_special_tokens=False)!r} {ids[:4]}"


def _plain(message: str, trace: str) -> str:
    """What a log says of an error, in one line; of an error of ours without its type and quotes."""
    if redaction.active():
        return redaction.of_log(message, trace)
    ours = re.fullmatch(r"UserError\((.*)\)", one_line(message))
    return str(ast.literal_eval(ours[1])) if ours else one_line(message)


def _wordiest(task: Task, config: RunConfig) -> list[Sample]:
    return sorted(task.dataset[: config.eval.limit], key=lambda s: len(str(s.input)))[-_WORDIEST:]


def _asked(task: Task, config: RunConfig) -> int:
    """How many samples the task will ask, each as often as it says."""
    return len(task.dataset[: config.eval.limit]) * (task.epochs or 1)


def _messages(asked: str | list[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else as_messages(asked)


def _compare(name: str, row: int, asked: list[int], taught: list[int], tokenizer) -> None:
    if asked == taught:
        return
    at = next((i for i, (a, t) in enumerate(zip(asked, taught, strict=False)) if a != t), min(len(asked), len(taught)))
    raise UserError(
        f"eval task {name} asks row {row} in other tokens than training teaches: from token {at} on, evaluation has "
        f"{_shown(asked[at : at + 8], tokenizer)}, training has {_shown(taught[at : at + 8], tokenizer)}; "
        "make dataset.prompt and dataset.system_prompt agree with torchtune.dataset"
    )
