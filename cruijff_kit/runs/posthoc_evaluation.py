"""Post-hoc evaluation: evaluate what an EvaluationRequest lists, item after item, with a model in memory.

Each item (a task, an epoch) is written to result.json as soon as it is done. `cruijff-kit evaluate` is the command.
"""

import signal
import socket
import time
from pathlib import Path

from cruijff_kit.config.data_policy import withholds_samples
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation.evaluation_grid import with_evaluation
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.records.environment import NAME as ENVIRONMENT
from cruijff_kit.records.environment import POSTHOC, write_environment
from cruijff_kit.records.failures import STOPPED, describe_failure
from cruijff_kit.records.result import Evaluation, Failure, RunResult, to_json
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import Heartbeat, RunState
from cruijff_kit.runs.evaluation_request import (
    ADAPTER,
    NAME,
    RUN,
    EvaluationRequest,
    find_requested,
    load_result,
    read_request,
    select_tasks,
)
from cruijff_kit.runs.plan import plan_evaluation
from cruijff_kit.runs.run import RunContext, record_objective
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.files import make_private
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import StopSignals


class EvaluationJobError(RuntimeError):
    """A post-hoc evaluation of which an item failed."""


def evaluate_pending(run: Path, context: RunContext | None = None, agent: bool | None = None) -> RunResult:
    """Evaluate the items in a run's evaluate.json; remove the file when all are evaluated.

    An item that fails does not stop the others.

    Args:
        run: the folder.
        context: of a SLURM job, which has started the run already.
        agent: as in `load_saved_config`.
    Raises:
        EvaluationJobError: an item failed; the result says why.
        KeyboardInterrupt: on Ctrl-C; what is finished is kept.
    """
    folder, request = RunFolder(run), read_request(run)
    config = request.config(run, agent)
    if config.dataset.tier == RED:
        make_private(run, config.experiment.name)
    result = load_result(run, request, config)
    result.tier, result.redacted = config.dataset.tier, withholds_samples(config)
    result.permission = config.dataset.permission
    stop = StopSignals(signal.SIGINT, signal.SIGTERM) if context is None else None
    heartbeat = context.heartbeat if context else Heartbeat(run)
    began, failure = time.monotonic(), None
    if stop:
        stop.install()
    try:
        with heartbeat:
            heartbeat.set(state=RunState.EVALUATING)
            try:
                failure = _evaluate(folder, request, config, result)
            except KeyboardInterrupt:
                heartbeat.set(state=RunState.INTERRUPTED, reason="the evaluation was interrupted", cause=STOPPED)
                raise
            except Exception as error:
                failure = describe_failure(error, "evaluate")
            spent = result.seconds.get("posthoc_evaluation", 0) + time.monotonic() - began
            result.seconds["posthoc_evaluation"] = round(spent, 3)
            _finish(folder, request, result, failure, heartbeat)
    finally:
        if stop:
            stop.uninstall()
    if failure is not None:
        raise EvaluationJobError(f"{failure.type}: {failure.message}")
    return result


def _finish(
    folder: RunFolder, request: EvaluationRequest, result: RunResult, failure: Failure | None, heartbeat: Heartbeat
) -> None:
    if request.subject == RUN:  # what was finished stays so
        result.posthoc_error = failure
    else:
        result.status, result.error, result.finished = (RunState.FAILED if failure else RunState.DONE), failure, now()
        result.seconds["total"] = result.seconds["posthoc_evaluation"]
    folder.write("result.json", to_json(result))
    if failure is None:
        (folder.path / NAME).unlink()
        heartbeat.set(state=RunState.DONE, reason=None, cause=None)
    else:
        reason = f"post-hoc evaluation: {failure.type}: {failure.message}"
        heartbeat.set(state=RunState.FAILED, reason=reason, cause=failure.cause)


def _evaluate(folder: RunFolder, request: EvaluationRequest, config: RunConfig, result: RunResult) -> Failure | None:
    """Evaluate the missing items; return why the first of those failed that did."""
    items = find_requested(request, config, result, folder)
    if not items:
        return None
    folder.discard_partial_logs(keep=[e.log for e in [*result.baseline, *result.evaluation]])
    plan = plan_evaluation(select_tasks(config, items.names))
    result.data_hash = plan.data_hash
    evaluator, failure = _ItemEvaluator(folder, request, config, plan, result), None
    for name, epoch in [*((n, None) for n in items.base_model), *items.trained]:
        try:
            new = evaluator.evaluate(name, epoch)
        except Exception as error:
            failure = failure or describe_failure(error, "evaluate")
            say(f"failed: {one_line(error)}")
            continue
        _save(new, result, folder)
        json_output.append(made=[{"run": result.name, "task": new.task, "epoch": new.epoch, "log": new.log}])
    if request.subject == ADAPTER and failure is None:
        record_objective(result, config)
    return failure


class _ItemEvaluator:
    """A model in memory that evaluates one item after another."""

    def __init__(
        self, folder: RunFolder, request: EvaluationRequest, config: RunConfig, plan: EvaluationPlan, result: RunResult
    ) -> None:
        from cruijff_kit.evaluation.engine import ChatModel
        from cruijff_kit.models.device import describe_machine, processor
        from cruijff_kit.models.placement import place_for_evaluation
        from cruijff_kit.training import process_cache

        self.folder, self.request, self.config, self.plan = folder, request, config, plan
        self.hash = result.config_hash
        # The run's own precision, whatever `auto` would be on this machine.
        dtype = result.machine.get("dtype", config.torchtune["dtype"])
        model, machine = place_for_evaluation(config.torchtune | {"dtype": dtype})
        self.chat_model = ChatModel(model, process_cache.get_tokenizer(config.torchtune["tokenizer"]), machine)
        described = {"host": socket.gethostname(), **describe_machine(machine), "processor": processor()}
        result.machine = result.machine or described
        write_environment(config, machine, POSTHOC if request.subject == RUN else ENVIRONMENT)
        self._loaded_epoch: int | None = None

    def evaluate(self, name: TaskName, epoch: int | None) -> Evaluation:
        """Evaluate a task with the adapter of an epoch; None: with the base model."""
        from cruijff_kit.evaluation import baseline, run_tasks

        if epoch is None:
            return baseline.evaluate_base_model([name], self.chat_model, self.config, self.plan, self.folder)[0]
        if self._loaded_epoch != epoch:
            self._load(epoch)
        adapter = Path(self.request.adapter) if self.request.adapter else None
        item = run_tasks.EvaluationItem(
            name, self.chat_model, self.config, self.plan, self.folder, epoch, self.hash, adapter
        )
        return run_tasks.evaluate_item(item)

    def _load(self, epoch: int) -> None:
        from cruijff_kit.evaluation.run_tasks import load_epoch
        from cruijff_kit.models.external_adapter import load_peft_adapter

        if self.request.adapter:
            load_peft_adapter(self.chat_model.model, Path(self.request.adapter))
        else:
            load_epoch(self.chat_model, self.folder, epoch)
        self._loaded_epoch = epoch


def _save(new: Evaluation, result: RunResult, folder: RunFolder) -> None:
    """Put an evaluation into the result and write that; move the log of one that it replaces to eval/replaced."""
    evaluations = result.baseline if new.epoch is None else result.evaluation
    logs = folder.base_model_eval if new.epoch is None else folder.eval
    for old in evaluations:
        log = logs / Path(old.log).name  # wherever the folder was when it was made
        if (old.task, old.epoch) == (new.task, new.epoch) and log.is_file() and log.name != Path(new.log).name:
            (folder.eval / "replaced").mkdir(exist_ok=True)
            log.rename(folder.eval / "replaced" / log.name)
    if new.epoch is None:
        result.baseline = with_evaluation(evaluations, new)
    else:
        result.evaluation = with_evaluation(evaluations, new)
    folder.write("result.json", to_json(result))
