"""The whole story of one run: check, untrained model, train, evaluate, result.json."""

import dataclasses
import json
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cruijff_kit.config import data_policy
from cruijff_kit.config.identity import config_hash, configuration_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.environment import write_environment
from cruijff_kit.records.failures import apply_retry_overrides, failure_of
from cruijff_kit.records.result import RunResult, read_result, to_json
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import CANCELLED, DONE, EVALUATING, FAILED, INTERRUPTED, Heartbeat, cancel_asked
from cruijff_kit.records.versions import code_hash, git_commit, versions
from cruijff_kit.runs.leak_check import number_units
from cruijff_kit.runs.plan import Plan, check
from cruijff_kit.training.coroutine import Story, told
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import Cancelled, StopSignals


def train_then_eval(config: RunConfig, swept: dict | None = None, start: "Start | None" = None) -> RunResult:
    """Train the adapter, evaluate the model while it is in memory, and leave everything in `config.output_dir`.

    result.json is written whatever happens, status.json while it happens. A folder that already holds a result is not
    written over, but for an unfinished one with `resume_from_checkpoint`. Ctrl-C (or SIGTERM) in training saves the state
    after the step that is under way; a second Ctrl-C stops at once.

    Args:
        config: what to run (`cruijff_kit.compose`).
        swept: the values that distinguish this run in its sweep, for tables.
        start: what a job on a cluster knows already.
    Raises:
        UserError: the config or the data cannot work, or the folder is taken; nothing was trained.
        Exception: whatever went wrong later; result.json says what and where.
    """
    return told(run_story(config, swept or {}, start), _evaluate_alone)


def _evaluate_alone(cell: Any) -> Any:
    from cruijff_kit.evaluation.run_tasks import evaluate_item

    return evaluate_item(cell)


def run_story(
    config: RunConfig,
    swept: dict[str, Any],
    start: "Start | None" = None,
    recipe_of: Callable[[RunConfig], Any] | None = None,
    pack: Callable[[], dict[str, Any] | None] = lambda: None,
) -> Story[RunResult]:
    """As `train_then_eval`, told side by side with others: asks for the passes that its recipe does not compute itself, and
    for each evaluation.

    Args:
        recipe_of: makes the recipe; None: the one that trains by itself.
        pack: what result.json says of the pack, in the end.
    """
    folder = RunFolder(config.output_dir)
    _refuse_taken(folder, config.resume_from_checkpoint)
    result = begin(config, swept)
    clock = _Clock(result)
    plan = None
    if start is None:
        with clock("setup"):
            plan = check(config)  # what is refused here leaves nothing behind
        start = Start(Heartbeat(folder.path), StopSignals(signal.SIGINT, signal.SIGTERM))
    status = start.heartbeat.status
    result.restarts, result.changes = status.restarts, dict(status.changes)
    result.effective_batch = config.effective_batch
    chosen, config = config, apply_retry_overrides(config, status.changes)
    start.stop.install()
    try:
        with start.heartbeat:
            try:
                with clock("setup"):
                    plan = plan or check(config)
                    say(plan.in_words())
                    folder.freeze(chosen, result.swept)
                    recipe = (recipe_of or _recipe)(config)
                with _cleaned_up(recipe, result):
                    yield from _train_and_evaluate(recipe, config, plan, folder, result, clock, start)
                result.status = DONE
            except BaseException as error:
                _note_end(result, error, clock.phase, start.stop)
                raise
            finally:
                result.finished, result.seconds["total"], result.multi_lora = now(), clock.total(), pack()
                folder.write("result.json", to_json(result))
                _note_status(result, start)
    finally:
        if not start.shared:
            start.stop.uninstall()
    return result


@dataclasses.dataclass
class Start:
    """What belongs to one start of a run: its heartbeat, and the signals that ask it to stop.

    shared: the signals are other runs' too, and let go by whoever made them.
    """

    heartbeat: Heartbeat
    stop: StopSignals
    shared: bool = False


def _note_end(result: RunResult, error: BaseException, phase: str, stop: StopSignals) -> None:
    # inspect-ai may turn an interruption into an error of its own.
    interrupted = isinstance(error, KeyboardInterrupt) or stop.received is not None
    result.status = INTERRUPTED if interrupted or isinstance(error, Cancelled) else FAILED
    if isinstance(error, Cancelled):
        return
    if not interrupted:
        result.error = failure_of(error, phase)
    elif not isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error


def _note_status(result: RunResult, start: Start) -> None:
    reason, cause, state = None, None, result.status
    if result.error is not None:
        reason, cause = f"{result.error.type}: {result.error.message}", result.error.cause
    elif result.status == INTERRUPTED and cancel_asked(start.heartbeat.run):
        state, reason = CANCELLED, "cancelled"
    elif result.status == INTERRUPTED:
        reason = f"stopped by {start.stop.received.name}" if start.stop.received else "interrupted"
        cause = "stopped"
    start.heartbeat.set(state=state, reason=reason, cause=cause)


def _refuse_taken(folder: RunFolder, resume: bool) -> None:
    if not folder.result.exists():
        return
    if not resume:
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    if read_result(folder.result).status == "done":
        raise UserError(f"{folder.path} is done; there is nothing to resume")


def _train_and_evaluate(
    recipe: Any, config: RunConfig, plan: Plan, folder: RunFolder, result: RunResult, clock: "_Clock", start: Start
) -> Story[None]:
    from cruijff_kit.evaluation import baseline, run_tasks
    from cruijff_kit.evaluation.engine import ChatModel
    from cruijff_kit.models.device import describe, processor
    from cruijff_kit.models.fingerprint import fingerprint

    with clock("setup"):
        result.steps, result.data_hash = plan.steps, plan.data_hash
        result.leaks, result.conversations = plan.leaks, plan.conversations
        result.rows = {"train": plan.packed_rows or plan.rows, "validation": plan.validation_rows}
        for warning in plan.warnings:
            say(f"warning: {warning}")
        start.heartbeat.set(total_steps=plan.steps["total"], epochs=config.epochs)
        folder.write_yaml("torchtune.yaml", config.torchtune)
        recipe.setup()
        result.model_hash = fingerprint(config.model.path)
        result.machine = {"host": socket.gethostname(), **describe(recipe.machine), "processor": processor()}
        write_environment(config, recipe.machine)

    def ask_untrained() -> None:
        with clock("baseline"):
            if config.eval.baseline:
                chat_model = ChatModel(recipe.model, recipe.tokenizer, recipe.machine)
                result.baseline = baseline.evaluate_base_model(config.eval.names, chat_model, config, plan, folder)

    if config.processes == 1:  # else the model is here only when the workers have gone
        ask_untrained()
    with clock("train", recipe.clock):
        yield from _train(recipe, bool(config.eval.tasks), folder, result, start)
        _note_units(config, folder)
    start.heartbeat.set(state=EVALUATING)
    if config.processes > 1:
        ask_untrained()
    with clock("evaluate", recipe.clock):
        folder.discard_partial_logs()
        epoch = recipe.summary.epochs - 1
        chat_model = ChatModel(recipe.model, recipe.tokenizer, recipe.machine)
        result.evaluation = yield from run_tasks.evaluation_story(
            chat_model, config, plan, folder, epoch, result.config_hash
        )
    note_objective(result, config)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _note_units(config: RunConfig, folder: RunFolder) -> None:
    """Add to the losses of validation rows which rows are of one unit: they say less than as many of different ones."""
    data, losses = config.dataset, folder.validation_losses
    if data.unit_column is None or not losses.is_file():
        return
    tree = json.loads(losses.read_text(encoding="utf-8"))
    tree["unit"] = number_units(data, data.validation_split, data.max_validation_samples, tree["row"])
    folder.write(losses.name, json.dumps(tree))


def note_objective(result: RunResult, config: RunConfig) -> None:
    """Look up the objective in what was measured.

    Raises:
        ValueError: it was named, and was not measured.
    """
    found = result.metrics()
    if result.objective_name not in found and config.objective is None:  # nothing was trained, or nothing validated
        result.objective_name = None
        return
    if result.objective_name not in found:
        raise ValueError(f"objective={result.objective_name} was not measured; there are {', '.join(found)}")
    result.objective = found[result.objective_name]


def _train(recipe: Any, then_evaluate: bool, folder: RunFolder, result: RunResult, start: Start) -> Story[None]:
    from cruijff_kit.recipes.lora_single_device import TrainingInterrupted

    result.resumed_at_step = recipe.global_step or None
    start.heartbeat.set(first_step=recipe.global_step, training_since=now())
    start.heartbeat.follow(lambda: _progress_of(recipe, result))
    try:
        with start.stop.stopping(recipe):
            yield from recipe.training()
        if then_evaluate:
            recipe.save_state()
            if start.stop.received is not None:  # it came too late for a step
                raise KeyboardInterrupt
    except TrainingInterrupted as interrupted:
        if recipe.stop_reason == CANCELLED:
            raise Cancelled(str(interrupted)) from interrupted
        say(f"{interrupted}; the state is saved: cruijff-kit resume {shlex.quote(str(folder.path))}")
        raise KeyboardInterrupt from interrupted
    finally:
        result.training = dataclasses.asdict(recipe.summary)
        result.changes |= recipe.changes


def _recipe(config: RunConfig) -> Any:
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice

    if config.processes == 1:
        return LoRAFinetuneRecipeSingleDevice(config.torchtune)
    from cruijff_kit.recipes.lora_distributed import LoRAFinetuneRecipeDistributed

    return LoRAFinetuneRecipeDistributed(config.torchtune)


@contextmanager
def _cleaned_up(recipe: Any, result: RunResult) -> Iterator[None]:
    """The recipe's metrics stay open until the run ends, for what evaluation finds."""
    from cruijff_kit.training.trackers import report

    try:
        yield
        found = {"eval": result.evaluation, "untrained": result.baseline}
        report(
            recipe,
            {
                f"{kind}/{e.task}/{scorer}/{metric}": value  # of several epochs the last one
                for kind, evaluations in found.items()
                for e in evaluations
                for scorer, values in e.metrics.items()
                for metric, value in values.items()
            },
        )
    finally:
        recipe.cleanup()


def _progress_of(recipe: Any, result: RunResult) -> dict[str, Any]:
    """What status.json says of a recipe under way."""
    seen = {"step": recipe.global_step, "epoch": recipe.epoch, "loss": recipe.summary.loss}
    return seen | {"changes": result.changes | recipe.changes}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that tables show."""
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


def begin(config: RunConfig, swept: dict) -> RunResult:
    """The result of a run that is about to start."""
    return RunResult(
        name=config.run_name,
        status="running",
        experiment=config.experiment.name,
        model=config.model.name,
        swept=swept,
        settings=settings_of(config),
        config_hash=config_hash(config),
        configuration_hash=configuration_hash(config),
        started=now("milliseconds"),  # tables are in order of start, and the runs of a pack start in one second
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
    """Seconds per phase, kept in the result; remembers the phase that is under way."""

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
