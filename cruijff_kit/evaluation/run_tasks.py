"""Runs inspect-ai tasks over the model in memory and makes sure that every sample was answered and scored."""

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.log import EvalLog, EvalScore, write_eval_log
from inspect_ai.model import Model
from inspect_ai.scorer import NOANSWER, Score

from cruijff_kit.config.data_policy import withholds_samples
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.data.generators import ceiling_of
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation import log_redaction
from cruijff_kit.evaluation.cells import item_key, with_evaluation
from cruijff_kit.evaluation.chance import TEST, chance_of, is_constant, targets_of, with_chance
from cruijff_kit.evaluation.engine import ChatModel
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.evaluation.external_tasks import build_external, check_arguments
from cruijff_kit.evaluation.provider import open_model
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.models.adapter import adapter_state, load_adapter, load_adapter_state
from cruijff_kit.records.result import Evaluation
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import make_private
from cruijff_kit.util.progress import progress, say
from cruijff_kit.util.redaction import parse_frames
from cruijff_kit.util.suggest import did_you_mean


class EvaluationError(RuntimeError):
    """A task did not answer and score all its samples; the message says which and why."""


@dataclass(frozen=True)
class EvaluationItem:
    """A task, to be answered by the adapter that the model holds now."""

    name: TaskName
    chat_model: ChatModel
    config: RunConfig
    plan: EvaluationPlan
    folder: RunFolder
    epoch: int
    """Whose adapter the model holds."""
    hash: str
    """Of the run's config."""
    adapter_folder: Path | None = None
    """Where the adapter lies, if not in the run's folder."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What its log says of who answered."""
        adapter = self.adapter_folder or self.folder.epoch(self.epoch)
        saved = str(adapter) if adapter.exists() else None
        return log_metadata(self.name, self.config, self.plan.data_hash, self.hash, self.epoch, saved)

    @property
    def prompts_checked(self) -> int:
        """How many of its prompts were compared with training."""
        return self.plan.prompts_checked.get(self.name.label, 0)


def evaluate_item(item: EvaluationItem) -> Evaluation:
    """Have a task answered by the adapter that the model holds.

    Raises:
        EvaluationError: as run_task.
    """
    return run_task(
        item.name, item.chat_model, item.config, item.folder.eval, item.epoch, item.metadata, item.prompts_checked
    )


def evaluate(
    chat_model: ChatModel,
    config: RunConfig,
    plan: EvaluationPlan,
    folder: RunFolder,
    last: int,
    config_hash: str,
    evaluate_item: Callable[[EvaluationItem], Evaluation] = evaluate_item,
) -> list[Evaluation]:
    """Evaluate each task of the config with the adapter of each evaluated epoch.

    Args:
        chat_model: the trained model; afterwards it is what it was.
        last: the epoch whose adapter it holds; those before are read from their folders.
        config_hash: of the run, for the logs.
        evaluate_item: evaluates one task with one adapter; by default alone.
    Raises:
        EvaluationError: an adapter is missing, there is nothing to do, or a task raised, or left a sample unanswered or all
            of them unscored.
    """
    if not config.eval.tasks:
        return []
    trained = adapter_state(chat_model.model)
    evaluations: list[Evaluation] = []
    try:
        for epoch in config.evaluated_epochs:
            if epoch != last:
                load_epoch(chat_model, folder, epoch)
            else:
                load_adapter_state(chat_model.model, trained)
            for name in config.eval.names:
                item = EvaluationItem(name, chat_model, config, plan, folder, epoch, config_hash)
                evaluations = with_evaluation(evaluations, evaluate_item(item))
    finally:
        load_adapter_state(chat_model.model, trained)
    expected = len(config.eval.tasks) * len(config.evaluated_epochs)
    if not expected or len(evaluations) != expected:
        raise EvaluationError(f"{len(evaluations)} evaluations were made, {expected} were asked for")
    return evaluations


def load_epoch(chat_model: ChatModel, folder: RunFolder, epoch: int) -> None:
    """Load the adapter that a run saved after an epoch into the model.

    Raises:
        EvaluationError: it is missing, or of another shape.
    """
    try:
        load_adapter(chat_model.model, folder.epoch(epoch))
    except FileNotFoundError as error:
        raise EvaluationError(f"the adapter of epoch {epoch} is missing: {folder.epoch(epoch)}") from error
    except Exception as error:
        raise EvaluationError(f"the adapter of epoch {epoch} cannot be read: {one_line(error)}") from error


def log_metadata(
    name: TaskName, config: RunConfig, data_hash: str, config_hash: str | None, epoch: int | None, adapter: str | None
) -> dict[str, Any]:
    """What a log says of who answered; one value each, so that inspect-ai's dataframes have them as columns.

    Args:
        config_hash: None for the untrained model, which many runs share.
        epoch: of the adapter, counted from 0; None for the untrained model.
        adapter: the folder of the adapter; None where it is not saved, or there is none.
    """
    lora = config.lora if epoch is not None else None
    return {
        "run": config.run_name if lora else "untrained",
        "task": str(name),
        "base_model": config.model.path,
        "adapter": adapter,
        "rank": lora and lora.rank,
        "alpha": lora and lora.alpha,
        "epoch": epoch,
        "config_hash": config_hash,
        "data_hash": data_hash,
        "unit_column": config.dataset.unit_column,
    }


def run_task(
    name: TaskName,
    chat_model: ChatModel,
    config: RunConfig,
    log_dir: Path,
    epoch: int | None,
    metadata: dict[str, Any],
    prompts_checked: int = 0,
) -> Evaluation:
    """One task, one .eval log, one Evaluation.

    Raises:
        EvaluationError: the task raised, or left a sample unanswered or all of them unscored.
    """
    started = time.monotonic()
    task, label = build_task(name, config), name.label
    who = "untrained model" if epoch is None else f"epoch {epoch}"
    with progress(f"{label}, {who}", min(len(task.dataset), config.eval.limit or len(task.dataset))) as bar:
        options = option_tokens(task)
        model = open_model(chat_model, config.model.name, config.eval.batch_size, bar.advance, options=options)
        log = run_inspect(task, model, config, log_dir, metadata)
        if config.dataset.tier == RED:
            log = _keep_red(log, config, log_dir, metadata, name.ships)
    evaluation = evaluation_of(name, config, task, log, epoch, time.monotonic() - started, prompts_checked)
    report_scores(evaluation)
    return evaluation


def evaluation_of(
    name: TaskName,
    config: RunConfig,
    task: Task,
    log: EvalLog,
    epoch: int | None,
    seconds: float,
    prompts_checked: int,
) -> Evaluation:
    """What came of a task.

    Raises:
        EvaluationError: as run_task.
    """
    label = name.label
    scored = _check(label, log, may_score_none=epoch is None or name.ships)
    chance, chance_from = chance_of(task, log.samples)
    samples = log.results.total_samples
    metrics = {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}
    return Evaluation(
        label, epoch, samples, metrics, log.location, round(seconds, 3), prompts_checked,
        unscored={s: samples - n for s, n in scored.items()},
        coverage={s: n / samples for s, n in scored.items()},
        ceiling=_ceiling(name, config),
        chance=chance, chance_from=chance_from,
        constant_answer=is_constant(log.samples),
        key=item_key(name, config), split=config.split_of(name),
    )  # fmt: skip


def report_scores(evaluation: Evaluation, begin: str = "") -> None:
    """Print a line with its scores."""
    who = "untrained model" if evaluation.epoch is None else f"epoch {evaluation.epoch}"
    first = next(iter(evaluation.metrics.values()), {})
    metrics = ", ".join(f"{m} {v:.3f}" for m, v in first.items())
    say(f"{begin}{evaluation.task}, {who}: {metrics} ({evaluation.samples} samples, {evaluation.seconds} s)")
    for scorer in (s for s, share in evaluation.coverage.items() if share == 0 and evaluation.epoch is not None):
        say(
            f"{begin}warning: {scorer} could score none of the {evaluation.samples} answers to {evaluation.task}; its "
            "numbers are a constant answer's, and by them the run ranks last"
        )


def _keep_red(log: EvalLog, config: RunConfig, log_dir: Path, metadata: dict[str, Any], ships: bool) -> EvalLog:
    """Write a log of red data, which is in memory so far, without its samples' contents.

    Returns:
        The whole log with its new place, and with results that can be told.
    """
    withholds = withholds_samples(config)
    make_private(log_dir)
    path = log_dir / log_redaction.file_name(log)
    metadata = log_redaction.marked(metadata, config, withholds)
    kept = told = log_redaction.redacted(log, config, metadata, ships)
    if not withholds:
        kept = log.model_copy(update={"eval": log.eval.model_copy(update={"metadata": metadata})})
    _outside_event_loop(lambda: write_eval_log(kept, str(path)))
    path.chmod(0o600)
    return log.model_copy(update={"location": str(path), "results": told.results})


def _ceiling(name: TaskName, config: RunConfig) -> dict[str, float]:
    data = config.dataset
    return ceiling_of(data.generator, data.arguments, name.split or data.test_split) if name.ships else {}


def build_task(name: TaskName, config: RunConfig) -> Task:
    """The inspect-ai task of a name; one that ships gets the run's data and prompt.

    Raises:
        UserError: no such task, a wrong argument, malformed data, or whatever a task of the user's does wrong.
    """
    arguments, dataset = config.eval.arguments_of(name), config.dataset
    if not name.ships:
        task = build_external(name, arguments)
        return with_chance(task, targets_of(task), TEST)
    if name.task not in TASKS:
        raise UserError(f"eval.tasks: {name.task} does not exist; {did_you_mean(name.task, [*TASKS])}")
    of_the_run = {
        "data": dataset.path,
        "split": name.split or dataset.test_split,
        "prompt": dataset.prompt,
        "system_prompt": dataset.system_prompt,
        "input_column": dataset.column_map["input"],
        "output_column": dataset.column_map["output"],
        "messages_column": dataset.column_map.get("messages"),
        "format": dataset.format,
        "split_column": dataset.split_column,
        "type": dataset.type,
        "max_samples": dataset.max_test_samples,
        "sample_seed": dataset.sample_seed,
        "train_split": dataset.train_split,
        "train_samples": dataset.max_samples,
    }
    check_arguments(name, TASKS[name.task], arguments, tuple(of_the_run))
    return TASKS[name.task](**of_the_run, **arguments)


def option_tokens(task: Task) -> tuple[str, ...]:
    """The options whose logits the task's scorers read, each a single token."""
    return tuple(dict.fromkeys(o for s in task.scorer or [] for o in getattr(s, "option_tokens", ())))


def check_tasks(config: RunConfig) -> None:
    """Build every task of the config once; raises UserError as `build_task`."""
    for name in config.eval.names:
        build_task(name, config)


def run_inspect(
    task: Task, model, config: RunConfig, log_dir: Path, metadata: dict[str, Any], score: bool = True
) -> EvalLog:
    """inspect-ai's eval with what must hold in a job: no display, no server, no retries; the first error ends it.

    The log of red data is not in `log_dir` but in memory, whole.

    Raises:
        UserError: the data is red, and something installed would see the samples.
    """
    asked = {"metadata": metadata, "score": score, **generation(task, config)}
    if config.dataset.tier != RED:
        return call_inspect([task], [model], config, **asked, log_dir=str(log_dir))[0]
    with log_redaction.kept_in_memory() as folder, redaction.silence():
        return call_inspect([task], [model], config, **asked, log_dir=folder, **log_redaction.IN_MEMORY)[0]


def generation(task: Task, config: RunConfig) -> dict[str, Any]:
    """Settings of generation, which differ from task to task."""
    settings = config.eval
    return {
        "max_tokens": task.config.max_tokens or settings.max_tokens,
        "logprobs": True if settings.logprobs or settings.top_logprobs else None,
        "top_logprobs": settings.top_logprobs,
    }


def call_inspect(tasks: list[Task], models: list[Model], config: RunConfig, **more: Any) -> list[EvalLog]:
    """inspect-ai's eval, with what all our calls of it have in common."""
    settings = config.eval
    options: dict[str, Any] = {
        "model": models[0],  # of tasks that have none of their own
        "limit": settings.limit,
        "log_format": "eval",
        "log_samples": True,
        "log_realtime": False,
        "log_buffer": 1000,  # samples, instead of up to ten: a log that was cut off is made anew, never read
        "log_level": "warning",
        "display": "none",
        "score_display": False,  # metrics of the samples so far, after each: nobody sees them
        "ctl_server": False,
        "fail_on_error": True,
        "max_samples": settings.batch_size,
        "max_connections": settings.batch_size,
    } | more
    often = gc.get_threshold()
    gc.set_threshold(10_000, *often[1:])  # a quarter of inspect-ai's own time went into looking for garbage
    try:
        return _outside_event_loop(lambda: eval(tasks, **options))
    finally:
        gc.set_threshold(*often)
        for model in models:
            model.api.end()


def _outside_event_loop(call: Callable[[], Any]) -> Any:
    """Call here, or in a thread where an event loop is running already (a notebook), which eval() would refuse."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    else:
        running = True
    if not running:
        return call()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _check(name: str, log: EvalLog, may_score_none: bool) -> dict[str, int]:
    """scorer -> samples that it scored; all of them were answered, and none of the scorers left all of them out.

    Args:
        may_score_none: whether our own scorers may, which count such samples all the same: of a task of ours, whose model
            may write no number or option; of any, where it has not been taught to yet.
    Raises:
        EvaluationError: what is wrong, in one line.
    """
    if log.status == "cancelled":  # inspect-ai took the Ctrl-C
        raise KeyboardInterrupt
    if log.status != "success":
        reason = redaction.redact_log(log.error.message, log.error.traceback) if log.error else log.status
        error = EvaluationError(f"task {name} ended as {log.status}: {reason}")
        if log.error:
            error.add_note(
                "\n".join(f'  File "{file}", line {line}' for file, line in parse_frames(log.error.traceback))
            )
        raise error
    samples, expected = log.samples or [], log.results.total_samples
    failed = [s for s in samples if s.error]
    if failed:
        first = redaction.redact_log(failed[0].error.message, failed[0].error.traceback)
        raise EvaluationError(f"task {name}: {len(failed)} of {expected} samples failed, first: {first}")
    if not expected or len(samples) != expected:
        raise EvaluationError(f"task {name}: {len(samples)} of {expected} samples were answered")
    if not log.results.scores:
        raise EvaluationError(f"task {name} has no scorer: 0 of {expected} samples were scored")
    scored = {}
    for score in log.results.scores:
        # Our own scorers say themselves what they left out: inspect-ai would keep such samples from their metrics.
        share = next((score.metrics[m].value for m in ("coverage", "parse_rate") if m in score.metrics), None)
        left_out = score.unscored_samples or 0
        scored[score.name] = expected - left_out if share is None else round(share * expected)
        if share is None and _none_answered([s.scores or {} for s in samples], score):
            scored[score.name] = 0
        if not (score.scored_samples and scored[score.name]) and (share is None or not may_score_none):
            why = next((e for s in samples if (e := _reason(s.scores or {}, score))), "")
            raise EvaluationError(f"task {name}: scorer {score.name} scored 0 of {expected} samples{why}")
    return scored


def _none_answered(scores: list[dict[str, Score]], score: EvalScore) -> bool:
    """Whether all that a scorer gave is "N" (which inspect-ai's accuracy counts as wrong) or NaN."""
    given = [found for s in scores if (found := s.get(score.name) or s.get(score.scorer)) is not None]
    values = [g.value.get(score.name) if isinstance(g.value, dict) else g.value for g in given]
    return bool(values) and all(v == NOANSWER or v != v for v in values)  # NaN alone is not itself


def _reason(scores: dict[str, Score], score: EvalScore) -> str:
    """Why a scorer did not score a sample, in its own words, as the end of a message."""
    given = scores.get(score.name) or scores.get(score.scorer)
    said = given and (given.explanation or given.reason)
    return f"; the first: {one_line(said)}" if said else ""
