"""Send metrics.jsonl to the trackers of `trackers=[...]`: TensorBoard, W&B and MLflow.

torchtune's loggers send the values; this module opens, resumes and closes them, so that each run of a process is a separate
run of the tracker. Nothing is read from a tracker, and a tracker that fails does not end the run. No tracker uses the
network unless the user's environment variables say so:

    tensorboard  event files in the run's folder; TensorBoard names the run after the folder
    wandb        offline, in the run's folder (`wandb sync` uploads it); WANDB_MODE=online uploads at once
    mlflow       files in the experiment's folder (`mlruns`); MLFLOW_TRACKING_URI selects a server or a database

MLflow's file store is in maintenance mode, but its SQLite store does not work here: runs of a sweep write at the same time
from several nodes, and SQLite's locks do not work on network file systems.

A resumed run continues the same run of the tracker. Local files are rewritten from metrics.jsonl. Other trackers (MLflow,
W&B online or synced) already have the steps since the last checkpoint, so these steps are not sent a second time. W&B's
measurements of the machine before the interruption are lost with the offline files.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from cruijff_kit.config import data_policy
from cruijff_kit.models.compat import MLFlowLogger, TensorBoardLogger, WandBLogger, flatten_dict, instantiate
from cruijff_kit.records.run_folder import find_experiment_folder
from cruijff_kit.training.metrics import MetricsFile
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import write_text
from cruijff_kit.util.progress import say

_IDS_FILE = "trackers.json"  # tracker -> its id of the run
_MAX_PARAMS = 100  # MLflow's limit per request


def check_trackers(names: list[str]) -> None:
    """Check that the trackers' packages are installed (package and extra have the tracker's name).

    Raises:
        UserError: a package is missing; the message has the command that installs it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin it is a folder of that name
            raise UserError(f"trackers={name} needs a package that is missing: pip install 'cruijff_kit[{name}]'")


@dataclass
class TrackedRun:
    """The run that a tracker shows."""

    experiment: str
    """Name of the experiment or project."""
    name: str
    """Name of the run."""
    folder: Path
    """Folder of the run."""
    config: dict[str, Any]
    """The torchtune config."""
    can_rewrite: bool
    """Whether a tracker's files in the run's folder may be rewritten."""


class _TensorBoard:
    """Writes event files `events.out.tfevents.*` in the run's folder; the config is under Text."""

    id, replays = None, True

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        if run.can_rewrite:
            for file in run.folder.glob("events.out.tfevents.*"):
                file.unlink()
        self.logger = TensorBoardLogger(log_dir=str(run.folder), organize_logs=False)
        if run.can_rewrite:
            self.logger._writer.add_text("config", "```\n" + OmegaConf.to_yaml(run.config) + "```")

    def close(self, error: type[BaseException] | None) -> None:
        self.logger.close()


class _WandB:
    """A W&B run in the project of the experiment's name, grouped by the sweep's folder, in `wandb/` of the run's folder."""

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        env = os.environ
        is_offline = env.get("WANDB_MODE", "offline") in ("offline", "dryrun")
        wandb_folder = run.folder / "wandb"
        self.id, self.replays = id or uuid.uuid4().hex[:12], is_offline and not [*wandb_folder.rglob("*.synced")]
        if run.can_rewrite and self.replays:
            for folder in wandb_folder.glob("offline-run-*"):
                shutil.rmtree(folder, ignore_errors=True)
        if is_offline:
            env.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports to W&B
        settings = {"mode": "offline", "silent": is_offline, "console": "off"}
        self.logger = WandBLogger(
            project=env.get("WANDB_PROJECT") or run.experiment,
            group=env.get("WANDB_RUN_GROUP") or run.folder.parent.name,
            log_dir=str(run.folder),
            name=run.name,
            id=self.id,
            resume="allow",
            config=run.config,
            allow_val_change=True,
            settings={k: v for k, v in settings.items() if f"WANDB_{k.upper()}" not in env},
        )

    def close(self, error: type[BaseException] | None) -> None:
        if self.logger._wandb.run:
            self.logger._wandb.finish(exit_code=0 if error is None else 1)
        # Otherwise the logger's destructor would end the run that is open then, which is the next one.
        del self.logger._wandb


class _MLflow:
    """An MLflow run in the experiment of that name, with the config as parameters."""

    replays = False

    def __init__(self, run: TrackedRun, id: str | None) -> None:
        self._environment = {k: os.environ.get(k) for k in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE")}
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow, self._sets_uri = mlflow, not mlflow.is_tracking_uri_set()
        store = _mlflow_store(run)
        try:
            if self._sets_uri:
                os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
                mlflow.set_tracking_uri(store.as_uri())
            if id is not None:
                os.environ["MLFLOW_RUN_ID"] = id
            store.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(store.with_name(".mlruns.lock")):  # runs that start at the same time share one experiment
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment
                self.logger = MLFlowLogger(experiment_name=name, run_name=run.name)
            self.id = mlflow.active_run().info.run_id
            if id is None:
                params = [(re.sub(r"[^\w\-./ ]", "_", k), v) for k, v in flatten_dict(run.config).items()]
                for start in range(0, len(params), _MAX_PARAMS):
                    mlflow.log_params(dict(params[start : start + _MAX_PARAMS]))
        except BaseException as error:
            self.close(type(error))
            raise

    def close(self, error: type[BaseException] | None) -> None:
        try:
            if self._mlflow.active_run():
                failure = "FAILED" if error is not None and issubclass(error, Exception) else "KILLED"
                self._mlflow.end_run("FINISHED" if error is None else failure)
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)  # still set if the run could not be resumed
            if hasattr(self, "logger") and hasattr(self.logger, "_mlflow"):
                del self.logger._mlflow  # for the reason given in _WandB.close
            if self._sets_uri:
                self._mlflow.set_tracking_uri(None)
                for name, value in self._environment.items():
                    os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _mlflow_store(run: TrackedRun) -> Path:
    """Return `mlruns` in the experiment's folder, else in the sweep's, else in the run's."""
    experiment, sweep = find_experiment_folder(run.folder, run.experiment), run.folder.parent
    return (experiment or (sweep if (sweep / "sweep.json").exists() else run.folder)) / "mlruns"


_KINDS: dict[str, Callable[[TrackedRun, str | None], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class Trackers:
    """The trackers of a run, open from its set-up to its end. The run is named after its folder.

    Args:
        config: the torchtune config, which the trackers show.
        names: some of tensorboard, wandb, mlflow.
        experiment: name of the experiment or project.
        reopen: reopen trackers that were closed, to add values.
    """

    def __init__(self, config: dict[str, Any], names: list[str], experiment: str, reopen: bool = False) -> None:
        folder = Path(config["output_dir"]).absolute()
        run = TrackedRun(experiment, folder.name, folder, config, can_rewrite=not reopen)
        ids_file, continues = folder / _IDS_FILE, reopen or config["resume_from_checkpoint"]
        ids = json.loads(ids_file.read_text()) if continues and ids_file.exists() else {}
        self._open: dict[str, Any] = {}
        self._repeats: dict[str, int] = {}  # tracker -> number of next lines that it already has
        if names and redaction.is_enabled():
            data_policy.refuse_servers()  # a .env file may have set a server since the run was checked
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _KINDS[name](run, ids.get(name))
            except Exception as error:
                _warn(name, error)
        if names:
            write_text(ids_file, json.dumps(ids | {name: t.id for name, t in self._open.items() if t.id}) + "\n")

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Send one step's values to each tracker."""
        for name in [*self._open]:
            if self._repeats.get(name):
                self._repeats[name] -= 1
            else:
                self._send(name, payload, step)

    def report(self, payload: Mapping[str, float], step: int) -> None:
        """Send the results of a run."""
        for name in [*self._open]:
            self._send(name, payload, step)

    def resume(self, lines: list[dict[str, float]], num_repeated: int) -> None:
        """Continue a resumed run.

        Args:
            lines: lines of metrics.jsonl up to the checkpoint.
            num_repeated: number of lines after the checkpoint; training will log them a second time.
        """
        for name, tracker in [*self._open.items()]:
            if not tracker.replays:
                self._repeats[name] = num_repeated
                continue
            for line in lines:
                self._send(name, {k: v for k, v in line.items() if k != "step"}, int(line["step"]))

    def _send(self, name: str, payload: Mapping[str, float], step: int) -> None:
        if name not in self._open:
            return
        try:
            self._open[name].logger.log_dict(payload, step)
        except Exception as error:
            _warn(name, error)
            self._close(name, type(error))

    def _close(self, name: str, error: type[BaseException] | None) -> None:
        try:
            self._open.pop(name).close(error)
        except Exception as close_error:
            if error is None:
                _warn(name, close_error)

    def close(self) -> None:
        """End the run in each tracker; while an exception propagates, as failed. Safe to call again."""
        for name in [*self._open]:
            self._close(name, sys.exc_info()[0])


def _warn(name: str, error: Exception) -> None:
    say(f"{name} failed and is disabled for this run; metrics.jsonl is complete: {one_line(error)}")


class MetricLogger:
    """The metric logger of a recipe: writes metrics.jsonl and sends values to the trackers."""

    def __init__(self, file: MetricsFile, trackers: Trackers) -> None:
        self.file, self.trackers = file, trackers

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write one step's values."""
        self.file.log_dict(payload, step)
        self.trackers.log_dict(payload, step)

    def tell(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return self.file.tell()

    def rewind(self, size: int) -> None:
        """Truncate metrics.jsonl to `size` bytes, and continue there."""
        num_repeated = self.file.rewind(size)
        self.trackers.resume(self.file.lines(), num_repeated)

    def close(self) -> None:
        """Close the file and the trackers. Safe to call again."""
        self.file.close()
        self.trackers.close()


def open_metric_logger(cfg: dict[str, Any]) -> MetricLogger:
    """Open the metric logger of a torchtune config."""
    return MetricLogger(instantiate(OmegaConf.create(cfg["metric_logger"])), _open_trackers(cfg))


def report(recipe: Any, values: dict[str, float]) -> None:
    """Send a finished run's results to its trackers; reopen the trackers if other processes trained the run."""
    if not values or not recipe.cfg["trackers"]["names"]:
        return
    metrics = getattr(recipe, "metrics", None)
    trackers = metrics.trackers if metrics is not None else _open_trackers(recipe.cfg, reopen=True)
    try:
        trackers.report(values, recipe.summary.steps)
    finally:
        if metrics is None:
            trackers.close()


def _open_trackers(cfg: dict[str, Any], **options: Any) -> Trackers:
    return instantiate(OmegaConf.create(cfg["trackers"]), cfg, **options)
