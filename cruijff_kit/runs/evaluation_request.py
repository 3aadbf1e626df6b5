"""evaluate.json: the evaluations that a run's folder waits for, and everything that is checked before they start.

The file stays until its evaluations are complete, so a SLURM job or `resume` finds what is left. A request is of a finished
run, of an adapter from elsewhere, or of a base model alone.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.config.groups import EvalConfig
from cruijff_kit.config.identity import config_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation.evaluation_grid import EvaluationGrid, find_missing
from cruijff_kit.models.adapter_files import ADAPTER_WEIGHTS
from cruijff_kit.records.archive_manifest import reject_archived
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.saved_config import load_saved_config
from cruijff_kit.runs.plan import plan_evaluation
from cruijff_kit.runs.run import start_result
from cruijff_kit.util.errors import UserError

NAME = "evaluate.json"
RUN, ADAPTER, BASE = "run", "adapter", "base"


@dataclass
class EvaluationRequest:
    """The content of evaluate.json."""

    eval: dict[str, Any]
    """The whole group."""
    slurm: dict[str, Any]
    """The whole group."""
    device: str = "auto"
    threads: int | None = None
    subject: str = RUN
    """run: the run's own adapters; adapter: one from elsewhere; base: the base model alone."""
    adapter: str | None = None
    """Folder of the adapter from elsewhere."""
    replaces: bool = False
    """Whether to evaluate again the items that exist under other settings."""

    def config(self, run: Path, agent: bool | None = None) -> RunConfig:
        """Return the run's saved config with the groups of the request.

        Raises:
            UserError: the folder has no config, or a group has a value that cannot be.
        """
        return self.apply(load_saved_config(run, agent=agent))

    def apply(self, config: RunConfig) -> RunConfig:
        """Return a config with the groups of the request."""
        cfg = config.torchtune | {"device": self.device, "threads": self.threads}
        return dataclasses.replace(
            config,
            eval=EvalConfig(**self.eval),
            slurm=SlurmConfig(**self.slurm),
            device=self.device,
            threads=self.threads,
            torchtune=cfg,
        )


def read_request(run: Path) -> EvaluationRequest | None:
    """Read the request in a run's folder; None if there is none.

    Raises:
        UserError: the file is not one of this version.
    """
    try:
        return EvaluationRequest(**json.loads((run / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / NAME} is not of this version of cruijff_kit: {error}") from error


def write_request(run: Path, request: EvaluationRequest) -> None:
    """Write the request into a run's folder."""
    RunFolder(run).write(NAME, json.dumps(dataclasses.asdict(request), indent=1) + "\n")


def load_result(run: Path, request: EvaluationRequest, config: RunConfig) -> RunResult:
    """Return the run's result; a new one for an adapter from elsewhere or a base model."""
    path = RunFolder(run).result
    if path.exists():
        return read_result(path)
    result = start_result(config, {})
    of_training = ("lr", "batch_size", "gradient_accumulation_steps", "epochs", "processes", "seed")
    result.settings |= dict.fromkeys(of_training)  # the training was not ours
    if request.subject == BASE:
        result.settings |= {"lora.rank": None, "lora.alpha": None}
    result.seeds = {}
    identity = [config_hash(config), request.subject, request.adapter]
    result.config_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    if request.adapter:
        result.paths["adapter"] = request.adapter
    return result


def find_requested(
    request: EvaluationRequest, config: RunConfig, result: RunResult, folder: RunFolder
) -> EvaluationGrid:
    """Return the requested items that the result lacks; for a base model alone, only its own.

    Raises:
        UserError: items exist under other settings, and the request does not replace them.
    """
    items = find_missing(config, result, folder)
    if request.subject == BASE:
        items.trained = []
    if items.changed and not request.replaces:
        raise UserError(
            f"{folder.path} has {', '.join(items.changed)} with other settings (arguments, eval.max_tokens, eval.limit, "
            "...); force=true evaluates them again and replaces them"
        )
    return items


def check_requested(
    items: EvaluationGrid, request: EvaluationRequest, config: RunConfig, result: RunResult, folder: RunFolder
) -> None:
    """Check everything that can be checked before any weights are read.

    Raises:
        UserError: an adapter is missing, the data has changed, or a task cannot work.
    """
    if request.subject == RUN:
        gone = sorted({e for _, e in items.trained if not (folder.epoch(e) / ADAPTER_WEIGHTS).is_file()})
        if gone:
            reject_archived(folder.path, gone)
            raise UserError(
                f"{folder.path} has no adapter of epoch {', '.join(map(str, gone))} "
                f"(epochs_to_save={config.epochs_to_save}, counted from 0)"
            )
    plan = plan_evaluation(select_tasks(config, items.names))
    if request.adapter:
        _check_fits(Path(request.adapter), config)
    if result.data_hash not in (None, plan.data_hash):
        raise UserError(
            f"{config.dataset.path} is not what {folder.path} was trained on (data_hash {plan.data_hash}, then "
            f"{result.data_hash}); put the file back"
        )


def _check_fits(adapter: Path, config: RunConfig) -> None:
    from cruijff_kit.models.base_model import build_on_meta
    from cruijff_kit.models.external_adapter import read_peft_state

    read_peft_state(build_on_meta(config.torchtune["model"]), adapter)


def base_identity(config: RunConfig) -> str:
    """Return what two runs share that can use one base model in memory."""
    cfg = config.torchtune
    parts = [
        config.model.path,
        cfg["checkpointer"]["_component_"],
        config.lora.quantize_base,
        cfg["dtype"],
        config.device,
    ]
    return json.dumps([*parts, config.processes])


def select_tasks(config: RunConfig, names: list[TaskName]) -> RunConfig:
    """Return a config with these of its tasks."""
    tasks = dataclasses.replace(config.eval, tasks=[str(n) for n in names])
    return dataclasses.replace(config, eval=tasks)
