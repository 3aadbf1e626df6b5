"""The whole story of one run: check, untrained model, train, evaluate, result.json."""

import dataclasses
import shlex
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cruijff_kit.config import RunConfig, config_hash
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.folder import RunFolder
from cruijff_kit.plan import Plan, check
from cruijff_kit.progress import say
from cruijff_kit.result import Failure, RunResult, git_commit, now, read_result, to_json, versions

if TYPE_CHECKING:
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice


def train_then_eval(config: RunConfig, swept: dict | None = None) -> RunResult:
    """Train the adapter, evaluate the model while it is in memory, and leave everything in `config.output_dir`.

    result.json is written whatever happens. A folder that already holds a result is not written over, but for an
    unfinished one with `resume_from_checkpoint`. Ctrl-C in training saves the state after the step that is under way; a
    second one stops at once.

    Args:
        config: what to run (`cruijff_kit.compose`).
        swept: the values that distinguish this run in its sweep, for tables.
    Raises:
        UserError: the config or the data cannot work, or the folder is taken; nothing was trained.
        Exception: whatever went wrong later; result.json says what and where.
    """
    folder = RunFolder(config.output_dir)
    _refuse_taken(folder, config.resume_from_checkpoint)
    result = _begin(config, swept or {})
    clock = _Clock(result)
    with clock("setup"):
        plan = check(config)  # what is refused here leaves nothing behind
    try:
        _train_and_evaluate(config, plan, folder, result, clock)
        result.status = "done"
    except KeyboardInterrupt:
        result.status = "interrupted"
        raise
    except BaseException as error:
        result.status = "failed"
        result.error = _failure(error, clock.phase)
        raise
    finally:
        result.finished, result.seconds["total"] = now(), clock.total()
        folder.write("result.json", to_json(result))
    return result


def _refuse_taken(folder: RunFolder, resume: bool) -> None:
    if not folder.result.exists():
        return
    if not resume:
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    if read_result(folder.result).status == "done":
        raise UserError(f"{folder.path} is done; there is nothing to resume")


def _train_and_evaluate(config: RunConfig, plan: Plan, folder: RunFolder, result: RunResult, clock: "_Clock") -> None:
    from cruijff_kit.evaluation import baseline, evaluate
    from cruijff_kit.evaluation.engine import ChatModel
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice, TrainingInterrupted

    with clock("setup"):
        result.steps, result.data_hash = plan.steps, plan.data_hash
        folder.freeze(config, result.swept)
        folder.write_yaml("torchtune.yaml", config.torchtune)
        recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
        recipe.setup()
        chat_model = ChatModel(recipe.model, recipe.tokenizer, recipe.machine)
        result.machine = {"host": socket.gethostname(), **chat_model.describe()}
    with clock("baseline"):
        if config.eval.baseline:
            result.baseline = baseline.evaluate_untrained(chat_model, config, plan, folder)
    with clock("train"):
        result.resumed_at_step = recipe.global_step or None
        try:
            with _asking_to_stop(recipe):
                recipe.train()
        except TrainingInterrupted as interrupted:
            say(f"{interrupted}; the state is saved: python -m cruijff_kit.resume {shlex.quote(str(folder.path))}")
            raise KeyboardInterrupt from interrupted
        finally:
            recipe.cleanup()
            result.training = dataclasses.asdict(recipe.summary)
    with clock("evaluate"):
        epoch = recipe.summary.epochs - 1
        result.evaluation = evaluate.evaluate(chat_model, config, plan, folder, epoch, result.config_hash)
    result.objective = result.metrics()[result.objective_name]
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


@contextmanager
def _asking_to_stop(recipe: "LoRAFinetuneRecipeSingleDevice") -> Iterator[None]:
    """Within this context Ctrl-C asks the recipe to stop after its step; the next Ctrl-C acts as usual."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    usual = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        recipe.stop_reason = "interrupted"
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _begin(config: RunConfig, swept: dict) -> RunResult:
    return RunResult(
        name=config.run_name,
        status="running",
        experiment=config.experiment,
        model=config.model.name,
        swept=swept,
        settings={
            "model": config.model.name,
            "dataset": config.dataset.name,
            "lora.rank": config.lora.rank,
            "lora.alpha": config.lora.alpha,
            "lr": config.lr,
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "epochs": config.epochs,
            "seed": config.seed,
        },
        config_hash=config_hash(config),
        started=now(),
        objective_name=config.objective_name,
        seeds={"seed": config.seed}
        | {f"dataset.arguments.{k}": v for k, v in config.dataset.arguments.items() if k == "seed"},
        versions=versions(),
        git_commit=git_commit(),
        paths={"run": config.output_dir, "data": config.dataset.path, "model": config.model.path},
    )


def _failure(error: BaseException, phase: str) -> Failure:
    return Failure(type(error).__name__, one_line(error), phase, "".join(traceback.format_exception(error)))


class _Clock:
    """Seconds per phase, kept in the result; remembers the phase that is under way."""

    def __init__(self, result: RunResult) -> None:
        self.result, self.phase, self.started = result, "setup", time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, started = phase, time.monotonic()
        try:
            yield
        finally:
            spent = self.result.seconds.get(phase, 0) + time.monotonic() - started
            self.result.seconds[phase] = round(spent, 3)

    def total(self) -> float:
        return round(time.monotonic() - self.started, 3)
