"""One run from its beginning to its end: check, base model, train, evaluate, result.json."""

import dataclasses
import json
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cruijff_kit.config import data_policy
from cruijff_kit.config.identity import config_hash, configuration_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.environment import write_environment
from cruijff_kit.records.failures import apply_retry_overrides, describe_failure
from cruijff_kit.records.result import RunResult, read_result, to_json
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import Heartbeat, RunState, is_cancel_requested
from cruijff_kit.records.versions import code_hash, git_commit, versions
from cruijff_kit.runs.leak_check import number_units
from cruijff_kit.runs.plan import RunPlan, plan_run
from cruijff_kit.training.out_of_memory import free_exception_frames
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import Cancelled, StopSignals

if TYPE_CHECKING:
    from cruijff_kit.recipes.lora_multi import Slot


def train_then_eval(config: RunConfig, swept: dict | None = None, context: "RunContext | None" = None) -> RunResult:
    """Train the adapter, evaluate the model while it is in memory, and leave everything in `config.output_dir`.

    result.json is written whatever happens, status.json while it happens. A folder that already holds a result is not
    written over, but for an unfinished one with `resume_from_checkpoint`. Ctrl-C (or SIGTERM) in training saves a
    checkpoint after the step that is under way; a second Ctrl-C stops at once.

    Args:
        config: what to run (`cruijff_kit.compose`).
        swept: the values that distinguish this run in its sweep, for tables.
        context: of a run that is started in a job of a cluster, or in a group.
    Raises:
        UserError: the config or the data cannot work, or the folder is taken; nothing was trained.
        Exception: whatever went wrong later; result.json says what and where.
    """
    run = Run(config, swept or {}, context)
    with run.recording():
        run.prepare()
        if config.processes == 1:
            run.evaluate_base_model()
        run.train()
        if config.processes > 1:  # the workers have gone, and only now the model is in this process
            run.evaluate_base_model()
        run.evaluate()
    return run.result


@dataclasses.dataclass
class RunContext:
    """Objects that the caller passes to a run."""

    heartbeat: Heartbeat
    """Writes its status.json."""
    stop: StopSignals
    """Signals that request it to stop."""
    slot: "Slot | None" = None
    """Slot in a group of runs that share a base model and the signals; None: it trains alone."""


class Run:
    """Phases of a run and their shared state."""

    def __init__(self, config: RunConfig, swept: dict[str, Any], context: RunContext | None) -> None:
        self.folder = RunFolder(config.output_dir)
        _refuse_taken(self.folder, config.resume_from_checkpoint)
        self.result = start_result(config, swept)
        self.clock = _Clock(self.result)
        self.plan: RunPlan | None = None
        self.recipe: Any = None
        if context is None:
            with self.clock("setup"):
                self.plan = plan_run(config)  # what is refused here leaves nothing behind
            context = RunContext(Heartbeat(self.folder.path), StopSignals(signal.SIGINT, signal.SIGTERM))
        self.context = context
        status = context.heartbeat.status
        self.result.restarts, self.result.changes = status.restarts, dict(status.changes)
        self.result.effective_batch = config.effective_batch
        self.requested, self.config = config, apply_retry_overrides(config, status.changes)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen for signals and keep status.json; in the end write result.json, whatever happened."""
        stop, slot, result = self.context.stop, self.context.slot, self.result
        stop.install()
        try:
            with self.context.heartbeat:
                try:
                    with self._open_recipe():
                        yield
                    result.status = RunState.DONE
                except BaseException as error:
                    free_exception_frames(error)
                    _record_error(result, error, self.clock.phase, stop)
                    raise
                finally:
                    result.finished, result.seconds["total"] = now(), self.clock.total()
                    result.multi_lora = slot.trainer.to_dict() if slot else None
                    self.folder.write("result.json", to_json(result))
                    _record_status(result, self.context)
        finally:
            if slot is None:
                stop.uninstall()

    def prepare(self) -> None:
        """Check the config, save it, read the base model and tokenise the data."""
        from cruijff_kit.models.device import describe_machine, processor
        from cruijff_kit.models.fingerprint import fingerprint

        config, result, slot = self.config, self.result, self.context.slot
        with self.clock("setup"):
            self.plan = plan = self.plan or plan_run(config)
            say(plan.summary())
            self.folder.freeze(self.requested, result.swept)
            self.recipe = recipe = slot.make_recipe(config.torchtune) if slot else _make_recipe(config)
            result.steps, result.data_hash = plan.steps, plan.data_hash
            result.leaks, result.conversations = plan.leaks, plan.conversations
            result.rows = {"train": plan.packed_rows or plan.rows, "validation": plan.validation_rows}
            for warning in plan.warnings:
                say(f"warning: {warning}")
            self.context.heartbeat.set(total_steps=plan.steps["total"], epochs=config.epochs)
            self.folder.write_yaml("torchtune.yaml", config.torchtune)
            recipe.setup()
            result.model_hash = fingerprint(config.model.path)
            result.machine = {
                "host": socket.gethostname(),
                **describe_machine(recipe.machine),
                "processor": processor(),
            }
            write_environment(config, recipe.machine)

    def evaluate_base_model(self) -> None:
        """Evaluate the base model without the adapter, or read the results of an earlier run."""
        config = self.config
        with self.clock("baseline"):
            if config.eval.baseline and config.eval.tasks:
                # A run without tasks does not load inspect-ai, which takes a second.
                from cruijff_kit.evaluation import baseline

                self.result.baseline = baseline.evaluate_base_model(
                    config.eval.names, self._make_chat_model(), config, self.plan, self.folder
                )

    def train(self) -> None:
        """Train the adapter; keep a checkpoint if the run is stopped in training or in evaluation."""
        from cruijff_kit.recipes.lora_single_device import TrainingInterrupted

        recipe, result, stop, heartbeat = self.recipe, self.result, self.context.stop, self.context.heartbeat
        with self.clock("train", recipe.clock):
            result.resumed_at_step = recipe.global_step or None
            heartbeat.set(first_step=recipe.global_step, training_since=now())
            heartbeat.follow(lambda: _progress_of(recipe, result))
            try:
                with stop.stopping(recipe):
                    recipe.train()
                if self.config.eval.tasks:
                    recipe.save_checkpoint()
                    if stop.received is not None:  # it came too late for a step
                        raise KeyboardInterrupt
            except TrainingInterrupted as interrupted:
                if recipe.stop_reason == RunState.CANCELLED:
                    raise Cancelled(str(interrupted)) from interrupted
                path = shlex.quote(str(self.folder.path))
                say(f"{interrupted}; the state is saved: cruijff-kit resume {path}")
                raise KeyboardInterrupt from interrupted
            finally:
                result.training = dataclasses.asdict(recipe.summary)
                result.changes |= recipe.changes
            _add_units(self.config, self.folder)
        heartbeat.set(state=RunState.EVALUATING)

    def evaluate(self) -> None:
        """Evaluate the trained model, which is in memory still."""
        config, folder, result, slot = self.config, self.folder, self.result, self.context.slot
        with self.clock("evaluate", self.recipe.clock):
            folder.discard_partial_logs()
            if config.eval.tasks:
                from cruijff_kit.evaluation import run_tasks

                epoch = self.recipe.summary.epochs - 1
                evaluate_item = slot.evaluate if slot else run_tasks.evaluate_item
                chat_model = self._make_chat_model()
                result.evaluation = run_tasks.evaluate(
                    chat_model, config, self.plan, folder, epoch, result.config_hash, evaluate_item
                )
        record_objective(result, config)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)

    def _make_chat_model(self) -> Any:
        from cruijff_kit.evaluation.engine import ChatModel

        return ChatModel(self.recipe.model, self.recipe.tokenizer, self.recipe.machine)

    @contextmanager
    def _open_recipe(self) -> Iterator[None]:
        """Keep the recipe's metrics and trackers open until the run ends, for the scores of evaluation."""
        try:
            yield
            from cruijff_kit.training.trackers import report

            evaluations = {"eval": self.result.evaluation, "base_model": self.result.baseline}
            report(
                self.recipe,
                {
                    f"{kind}/{e.task}/{scorer}/{metric}": value  # of several epochs the last one
                    for kind, of_kind in evaluations.items()
                    for e in of_kind
                    for scorer, values in e.metrics.items()
                    for metric, value in values.items()
                },
            )
        finally:
            if self.recipe is not None:
                self.recipe.cleanup()


def _make_recipe(config: RunConfig) -> Any:
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice

    if config.processes == 1:
        return LoRAFinetuneRecipeSingleDevice(config.torchtune)
    from cruijff_kit.recipes.lora_distributed import LoRAFinetuneRecipeDistributed

    return LoRAFinetuneRecipeDistributed(config.torchtune)


def _refuse_taken(folder: RunFolder, resume: bool) -> None:
    if not folder.result.exists():
        return
    if not resume:
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    if read_result(folder.result).status == "done":
        raise UserError(f"{folder.path} is done; there is nothing to resume")


def _record_error(result: RunResult, error: BaseException, phase: str, stop: StopSignals) -> None:
    # inspect-ai may turn an interruption into an error of its own.
    is_interrupted = isinstance(error, KeyboardInterrupt) or stop.received is not None
    result.status = RunState.INTERRUPTED if is_interrupted or isinstance(error, Cancelled) else RunState.FAILED
    if isinstance(error, Cancelled):
        return
    if not is_interrupted:
        result.error = describe_failure(error, phase)
    elif not isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error


def _record_status(result: RunResult, context: RunContext) -> None:
    reason, cause, state = None, None, result.status
    if result.error is not None:
        reason, cause = f"{result.error.type}: {result.error.message}", result.error.cause
    elif result.status == RunState.INTERRUPTED and is_cancel_requested(context.heartbeat.run):
        state, reason = RunState.CANCELLED, "cancelled"
    elif result.status == RunState.INTERRUPTED:
        reason = f"stopped by {context.stop.received.name}" if context.stop.received else "interrupted"
        cause = "stopped"
    context.heartbeat.set(state=state, reason=reason, cause=cause)


def _add_units(config: RunConfig, folder: RunFolder) -> None:
    """Add the number of its unit to each validation row's loss, because losses of one unit are not independent."""
    data, losses = config.dataset, folder.validation_losses
    if data.unit_column is None or not losses.is_file():
        return
    tree = json.loads(losses.read_text(encoding="utf-8"))
    tree["unit"] = number_units(data, data.validation_split, data.max_validation_samples, tree["row"])
    folder.write(losses.name, json.dumps(tree))


def record_objective(result: RunResult, config: RunConfig) -> None:
    """Look up the objective in what was measured.

    Raises:
        ValueError: it was named, and was not measured.
    """
    metrics = result.metrics()
    if result.objective_name not in metrics and config.objective is None:  # nothing was trained, or nothing validated
        result.objective_name = None
        return
    if result.objective_name not in metrics:
        raise ValueError(f"objective={result.objective_name} was not measured; there are {', '.join(metrics)}")
    result.objective = metrics[result.objective_name]


def _progress_of(recipe: Any, result: RunResult) -> dict[str, Any]:
    """Return the progress of a recipe for status.json."""
    position = {"step": recipe.global_step, "epoch": recipe.epoch, "loss": recipe.summary.loss}
    return position | {"changes": result.changes | recipe.changes}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that tables show."""
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "lora.rank": config.lora.rank,
        "lora.alpha": config.lora.alpha,
        "lr": config.lr,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "processes": config.processes,
        "epochs": config.epochs,
        "seed": config.seed,
    }


def start_result(config: RunConfig, swept: dict) -> RunResult:
    """Make the result of a run that is about to start."""
    return RunResult(
        name=config.run_name,
        status="running",
        experiment=config.experiment.name,
        model=config.model.name,
        swept=swept,
        settings=settings_of(config),
        config_hash=config_hash(config),
        configuration_hash=configuration_hash(config),
        started=now("milliseconds"),  # tables are in order of start, and the runs of a group start in one second
        objective_name=config.objective_name,
        seeds={"seed": config.seed}
        | {f"dataset.arguments.{k}": v for k, v in config.dataset.arguments.items() if k == "seed"},
        versions=versions(),
        git_commit=git_commit(),
        code_hash=code_hash(),
        paths={"run": config.output_dir, "data": config.dataset.path, "model": config.model.path},
        tier=config.dataset.tier,
        redacted=data_policy.withholds_samples(config),
        permission=config.dataset.permission,
        allowed_leaks=list(config.dataset.allow_leaks),
        unit_column=config.dataset.unit_column,
    )


class _Clock:
    """Adds up seconds per phase in the result; `phase` is the one that is under way."""

    def __init__(self, result: RunResult) -> None:
        self.result, self.phase = result, "setup"

    @contextmanager
    def __call__(self, phase: str, time_of: Callable[[], float] = time.monotonic) -> Iterator[None]:
        self.phase, started = phase, time_of()
        try:
            yield
        finally:
            spent = self.result.seconds.get(phase, 0) + time_of() - started
            self.result.seconds[phase] = round(spent, 3)

    def total(self) -> float:
        return round(sum(self.result.seconds.values()), 3)
