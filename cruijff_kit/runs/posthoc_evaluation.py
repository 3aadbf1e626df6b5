"""Post-hoc evaluation: cells that finished runs lack, adapters from elsewhere, base models alone.

What is asked for stands in the run's folder (evaluate.json) until it is done, so a job on a cluster, or `resume`, can go on
with it. `cruijff-kit evaluate` is the command.
"""

import dataclasses
import hashlib
import json
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.config.data_policy import withholds_samples
from cruijff_kit.config.groups import EvalConfig
from cruijff_kit.config.identity import config_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation.cells import EvaluationGrid, find_missing, with_evaluation
from cruijff_kit.evaluation.evaluation_plan import EvaluationPlan
from cruijff_kit.records.archive_manifest import refuse_archived
from cruijff_kit.records.environment import NAME as ENVIRONMENT
from cruijff_kit.records.environment import POSTHOC, write_environment
from cruijff_kit.records.failures import STOPPED, failure_of
from cruijff_kit.records.result import Evaluation, Failure, RunResult, read_result, to_json
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import DONE, EVALUATING, FAILED, INTERRUPTED, Heartbeat
from cruijff_kit.records.saved_config import frozen
from cruijff_kit.runs.plan import check_evaluation
from cruijff_kit.runs.run import RunContext, record_objective, start_result
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import close_folder
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import StopSignals

NAME = "evaluate.json"
RUN, ADAPTER, BASE = "run", "adapter", "base"


@dataclass
class Request:
    """evaluate.json: what a run's folder is waiting to have evaluated.

    eval, slurm: these groups, whole. device, threads: as in RunConfig. of: run (its own adapters), adapter (one from
    elsewhere) or base (none). adapter: the folder of that one. again: also the cells that exist under other settings.
    """

    eval: dict[str, Any]
    slurm: dict[str, Any]
    device: str = "auto"
    threads: int | None = None
    of: str = RUN
    adapter: str | None = None
    again: bool = False

    def config(self, run: Path) -> RunConfig:
        """The run's frozen config with what is asked for in its place.

        Raises:
            UserError: the folder has no config, or what is asked for cannot be.
        """
        return with_request(frozen(run), self)


def with_request(config: RunConfig, request: Request) -> RunConfig:
    """A run's config with the groups of a request."""
    cfg = config.torchtune | {"device": request.device, "threads": request.threads}
    return dataclasses.replace(
        config,
        eval=EvalConfig(**request.eval),
        slurm=SlurmConfig(**request.slurm),
        device=request.device,
        threads=request.threads,
        torchtune=cfg,
    )


def read_request(run: Path) -> Request | None:
    """What a run's folder is waiting to have evaluated; None: nothing.

    Raises:
        UserError: the file is not one of this version.
    """
    try:
        return Request(**json.loads((run / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / NAME} is not of this version of cruijff_kit: {error}") from error


def write_request(run: Path, request: Request) -> None:
    """Let a run's folder wait for an evaluation."""
    RunFolder(run).write(NAME, json.dumps(dataclasses.asdict(request), indent=1) + "\n")


def result_for(run: Path, request: Request, config: RunConfig) -> RunResult:
    """The run's result; a new one for an adapter from elsewhere or a base model."""
    path = RunFolder(run).result
    if path.exists():
        return read_result(path)
    result = start_result(config, {})
    untrained = ("lr", "batch_size", "gradient_accumulation_steps", "epochs", "processes", "seed")
    result.settings |= dict.fromkeys(untrained)  # of a training that was not ours
    if request.of == BASE:
        result.settings |= {"lora.rank": None, "lora.alpha": None}
    result.seeds = {}
    identity = [config_hash(config), request.of, request.adapter]
    result.config_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    if request.adapter:
        result.paths["adapter"] = request.adapter
    return result


def cells_of(request: Request, config: RunConfig, result: RunResult, folder: RunFolder) -> EvaluationGrid:
    """What is missing; of a base model alone, only the untrained model's.

    Raises:
        UserError: there are cells under other settings, and `again` was not said.
    """
    cells = find_missing(config, result, folder.eval)
    if request.of == BASE:
        cells.trained = []
    if cells.changed and not request.again:
        raise UserError(
            f"{folder.path} has {', '.join(cells.changed)} with other settings (arguments, eval.max_tokens, eval.limit, "
            "...); force=true evaluates them again and puts them in the others' place"
        )
    return cells


def check_cells(
    cells: EvaluationGrid, request: Request, config: RunConfig, result: RunResult, folder: RunFolder
) -> None:
    """Everything that can be checked before any weights are read.

    Raises:
        UserError: an adapter is missing, the data has changed, or a task cannot work.
    """
    if request.of == RUN:
        gone = sorted({e for _, e in cells.trained if not (folder.epoch(e) / "adapter_model.safetensors").is_file()})
        if gone:
            refuse_archived(folder.path, gone)
            raise UserError(
                f"{folder.path} has no adapter of epoch {', '.join(map(str, gone))} "
                f"(epochs_to_save={config.epochs_to_save}, counted from 0)"
            )
    plan = check_evaluation(asking_only(config, cells.names))
    if request.adapter:
        _check_fits(Path(request.adapter), config)
    if result.data_hash not in (None, plan.data_hash):
        raise UserError(
            f"{config.dataset.path} is not what {folder.path} was trained on (data_hash {plan.data_hash}, then "
            f"{result.data_hash}); put the file back"
        )


def _check_fits(adapter: Path, config: RunConfig) -> None:
    from cruijff_kit.models.base_model import skeleton
    from cruijff_kit.models.external_adapter import state_for

    state_for(skeleton(config.torchtune["model"]), adapter)


def base_identity(config: RunConfig) -> str:
    """What two runs share whose base model needs to be read once."""
    cfg = config.torchtune
    parts = [
        config.model.path,
        cfg["checkpointer"]["_component_"],
        config.lora.quantize_base,
        cfg["dtype"],
        config.device,
    ]
    return json.dumps([*parts, config.processes])


def asking_only(config: RunConfig, names: list[TaskName]) -> RunConfig:
    """A config with these of its tasks."""
    tasks = dataclasses.replace(config.eval, tasks=[str(n) for n in names])
    return dataclasses.replace(config, eval=tasks)


def evaluate_pending(run: Path, context: RunContext | None = None) -> RunResult:
    """Do what a run's evaluate.json asks for; each cell stands in result.json as soon as it is made.

    A cell that fails does not keep the others from being made. When all are there, evaluate.json is removed.

    Args:
        run: the folder.
        context: of a job on a cluster, which has started already.
    Raises:
        LateError: cells are missing in the end; the result says why.
        KeyboardInterrupt: on Ctrl-C; what was made is kept.
    """
    folder, request = RunFolder(run), read_request(run)
    config = request.config(run)
    if config.dataset.tier == RED:
        close_folder(run, config.experiment)
    result = result_for(run, request, config)
    result.tier, result.redacted = config.dataset.tier, withholds_samples(config)
    result.permission = config.dataset.permission
    stop = StopSignals(signal.SIGINT, signal.SIGTERM) if context is None else None
    heartbeat = context.heartbeat if context else Heartbeat(run)
    began, failure = time.monotonic(), None
    if stop:
        stop.install()
    try:
        with heartbeat:
            heartbeat.set(state=EVALUATING)
            try:
                failure = _evaluate(folder, request, config, result)
            except KeyboardInterrupt:
                heartbeat.set(state=INTERRUPTED, reason="the evaluation was interrupted", cause=STOPPED)
                raise
            except Exception as error:
                failure = failure_of(error, "evaluate")
            spent = result.seconds.get("posthoc_evaluation", 0) + time.monotonic() - began
            result.seconds["posthoc_evaluation"] = round(spent, 3)
            _conclude(folder, request, result, failure, heartbeat)
    finally:
        if stop:
            stop.uninstall()
    if failure is not None:
        raise EvaluationJobError(f"{failure.type}: {failure.message}")
    return result


class EvaluationJobError(RuntimeError):
    """Cells that were asked for could not be made."""


def _conclude(
    folder: RunFolder, request: Request, result: RunResult, failure: Failure | None, heartbeat: Heartbeat
) -> None:
    if request.of == RUN:  # what was finished stays so
        result.posthoc_error = failure
    else:
        result.status, result.error, result.finished = (FAILED if failure else DONE), failure, now()
        result.seconds["total"] = result.seconds["posthoc_evaluation"]
    folder.write("result.json", to_json(result))
    if failure is None:
        (folder.path / NAME).unlink()
        heartbeat.set(state=DONE, reason=None, cause=None)
    else:
        reason = f"post-hoc evaluation: {failure.type}: {failure.message}"
        heartbeat.set(state=FAILED, reason=reason, cause=failure.cause)


def _evaluate(folder: RunFolder, request: Request, config: RunConfig, result: RunResult) -> Failure | None:
    """Make the missing cells; why the first of those failed that did."""
    cells = cells_of(request, config, result, folder)
    if not cells:
        return None
    folder.discard_partial_logs(keep=[e.log for e in [*result.baseline, *result.evaluation]])
    plan = check_evaluation(asking_only(config, cells.names))
    result.data_hash = plan.data_hash
    maker, failure = _Maker(folder, request, config, plan, result), None
    for name, epoch in [*((n, None) for n in cells.untrained), *cells.trained]:
        try:
            new = maker.make(name, epoch)
        except Exception as error:
            failure = failure or failure_of(error, "evaluate")
            say(f"failed: {one_line(error)}")
            continue
        _keep(new, result, folder)
        json_output.extend(made=[{"run": result.name, "task": new.task, "epoch": new.epoch, "log": new.log}])
    if request.of == ADAPTER and failure is None:
        record_objective(result, config)
    return failure


class _Maker:
    """A model in memory that answers one cell after another."""

    def __init__(
        self, folder: RunFolder, request: Request, config: RunConfig, plan: EvaluationPlan, result: RunResult
    ) -> None:
        from cruijff_kit.evaluation.engine import ChatModel
        from cruijff_kit.models.device import describe, processor
        from cruijff_kit.models.placement import for_evaluation
        from cruijff_kit.training import process_cache

        self.folder, self.request, self.config, self.plan = folder, request, config, plan
        self.hash = result.config_hash
        # The run's own precision, whatever `auto` would be on this machine.
        dtype = result.machine.get("dtype", config.torchtune["dtype"])
        model, machine = for_evaluation(config.torchtune | {"dtype": dtype})
        self.chat_model = ChatModel(model, process_cache.get_tokenizer(config.torchtune["tokenizer"]), machine)
        described = {"host": socket.gethostname(), **describe(machine), "processor": processor()}
        result.machine = result.machine or described
        write_environment(config, machine, POSTHOC if request.of == RUN else ENVIRONMENT)
        self._held: int | None = None

    def make(self, name: TaskName, epoch: int | None) -> Evaluation:
        """A cell; epoch None: of the untrained model."""
        from cruijff_kit.evaluation import baseline, run_tasks

        if epoch is None:
            return baseline.evaluate_base_model([name], self.chat_model, self.config, self.plan, self.folder)[0]
        if self._held != epoch:
            self._load(epoch)
        place = Path(self.request.adapter) if self.request.adapter else None
        item = run_tasks.EvaluationItem(
            name, self.chat_model, self.config, self.plan, self.folder, epoch, self.hash, place
        )
        return run_tasks.evaluate_item(item)

    def _load(self, epoch: int) -> None:
        from cruijff_kit.evaluation.run_tasks import load_epoch
        from cruijff_kit.models.external_adapter import load_foreign_adapter

        if self.request.adapter:
            load_foreign_adapter(self.chat_model.model, Path(self.request.adapter))
        else:
            load_epoch(self.chat_model, self.folder, epoch)
        self._held = epoch


def _keep(new: Evaluation, result: RunResult, folder: RunFolder) -> None:
    """Put a cell into the result and write that; the log of one that it replaces goes to eval/replaced."""
    made = result.baseline if new.epoch is None else result.evaluation
    logs = folder.eval / "untrained" if new.epoch is None else folder.eval
    for old in made:
        log = logs / Path(old.log).name  # wherever the folder was when it was made
        if (old.task, old.epoch) == (new.task, new.epoch) and log.is_file() and log.name != Path(new.log).name:
            (folder.eval / "replaced").mkdir(exist_ok=True)
            log.rename(folder.eval / "replaced" / log.name)
    if new.epoch is None:
        result.baseline = with_evaluation(made, new)
    else:
        result.evaluation = with_evaluation(made, new)
    folder.write("result.json", to_json(result))
