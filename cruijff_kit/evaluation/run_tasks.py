"""Evaluates a model: runs tasks over it, one log and one Evaluation each."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.log import EvalLog, write_eval_log

from cruijff_kit.config.data_policy import withholds_samples
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.data.generators import read_bayes_optimum
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation import log_redaction
from cruijff_kit.evaluation.build_tasks import build_task, count_requests, option_tokens
from cruijff_kit.evaluation.chance import chance_of, is_constant
from cruijff_kit.evaluation.engine import ChatModel
from cruijff_kit.evaluation.evaluation_grid import item_key, with_evaluation
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.evaluation.inspect_eval import call_outside_event_loop, run_inspect
from cruijff_kit.evaluation.log_checks import EvaluationError, check_log
from cruijff_kit.evaluation.provider import open_model
from cruijff_kit.models.adapter import adapter_state, load_adapter, load_adapter_state
from cruijff_kit.records.result import Evaluation
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.files import make_private
from cruijff_kit.util.progress import progress, say


@dataclass(frozen=True)
class EvaluationItem:
    """A task, to be answered by the adapter that the model holds now."""

    name: TaskName
    chat_model: ChatModel
    config: RunConfig
    plan: EvaluationPlan
    folder: RunFolder
    epoch: int
    """Epoch of the adapter in the model, counted from 0."""
    hash: str
    """config_hash of the run."""
    adapter_folder: Path | None = None
    """Folder of the adapter, if it is not in the run's folder."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of its log, as of `log_metadata`."""
        adapter = self.adapter_folder or self.folder.epoch(self.epoch)
        saved = str(adapter) if adapter.exists() else None
        return log_metadata(self.name, self.config, self.plan.data_hash, self.hash, self.epoch, saved)

    @property
    def prompts_checked(self) -> int:
        """Number of its prompts that were compared with training."""
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
        raise EvaluationError(f"{len(evaluations)} of {expected} evaluations are complete")
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
    """Return the metadata of a log about its model; scalars, so that inspect-ai's dataframes have them as columns.

    Args:
        config_hash: None for the base model, which many runs share.
        epoch: of the adapter, counted from 0; None for the base model.
        adapter: the folder of the adapter; None where it is not saved, or there is none.
    """
    lora = config.lora if epoch is not None else None
    return {
        "run": config.run_name if lora else "base model",
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
    model_name = "base model" if epoch is None else f"epoch {epoch}"
    with progress(f"{label}, {model_name}", min(len(task.dataset), config.eval.limit or len(task.dataset))) as bar:
        model = open_model(
            chat_model, config.model.name, config.eval.batch_size, bar.advance, options=option_tokens(task),
            num_requests=count_requests(task, config),
        )  # fmt: skip
        log = run_inspect(task, model, config, log_dir, metadata)
        if config.dataset.tier == RED:
            log = _write_red_log(log, config, log_dir, metadata, name.ships)
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
    """Return the evaluation of a task from its log.

    Raises:
        EvaluationError: as run_task.
    """
    label = name.label
    scored = check_log(label, log, may_score_none=epoch is None or name.ships)
    chance, chance_from = chance_of(task, log.samples)
    samples = log.results.total_samples
    metrics = {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}
    return Evaluation(
        label, epoch, samples, metrics, log.location, round(seconds, 3), prompts_checked,
        unscored={s: samples - n for s, n in scored.items()},
        coverage={s: n / samples for s, n in scored.items()},
        bayes_optimum=_bayes_optimum(name, config),
        chance=chance, chance_from=chance_from,
        constant_answer=is_constant(log.samples),
        key=item_key(name, config), split=config.split_of(name),
    )  # fmt: skip


def report_scores(evaluation: Evaluation, begin: str = "") -> None:
    """Print a line with its scores."""
    model_name = "base model" if evaluation.epoch is None else f"epoch {evaluation.epoch}"
    first = next(iter(evaluation.metrics.values()), {})
    metrics = ", ".join(f"{m} {v:.3f}" for m, v in first.items())
    say(f"{begin}{evaluation.task}, {model_name}: {metrics} ({evaluation.samples} samples, {evaluation.seconds} s)")
    for scorer in (s for s, share in evaluation.coverage.items() if share == 0 and evaluation.epoch is not None):
        say(
            f"{begin}warning: {scorer} could score none of the {evaluation.samples} answers to {evaluation.task}; its "
            "numbers are a constant answer's, and by them the run ranks last"
        )


def _write_red_log(log: EvalLog, config: RunConfig, log_dir: Path, metadata: dict[str, Any], ships: bool) -> EvalLog:
    """Write a log of red data, which is in memory so far, without its samples' contents.

    Returns:
        The whole log with its new location, and with results that may be shown.
    """
    withholds = withholds_samples(config)
    make_private(log_dir)
    path = log_dir / log_redaction.file_name(log)
    metadata = log_redaction.add_tier_metadata(metadata, config, withholds)
    stored_log = redacted_log = log_redaction.redact_eval_log(log, config, metadata, ships)
    if not withholds:
        stored_log = log.model_copy(update={"eval": log.eval.model_copy(update={"metadata": metadata})})
    call_outside_event_loop(lambda: write_eval_log(stored_log, str(path)))
    path.chmod(0o600)
    return log.model_copy(update={"location": str(path), "results": redacted_log.results})


def _bayes_optimum(name: TaskName, config: RunConfig) -> dict[str, float]:
    data = config.dataset
    return read_bayes_optimum(data.generator, data.arguments, name.split or data.test_split) if name.ships else {}
