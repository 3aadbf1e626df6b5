"""TensorBoard, W&B and MLflow: the trackers that `trackers=[...]` names get every line of metrics.jsonl.

torchtune's own loggers do the logging; this module opens, resumes and closes them, so that each run of a process is a
separate run there. Nothing is ever read back from a tracker, and a tracker that fails does not end the run. Without the
user's own environment variables no tracker uses the network:

    tensorboard  event files in the run's folder, so that TensorBoard calls the run by its folder's name
    wandb        offline, in the run's folder (`wandb sync` uploads it); WANDB_MODE=online uploads at once
    mlflow       files below the experiment's folder (`mlruns`); MLFLOW_TRACKING_URI chooses a server or a database

MLflow's files are chosen over its SQLite, although MLflow only maintains them: runs of a sweep write at the same time, from
several nodes, and SQLite's locks do not hold on the network file systems that clusters share.

A resumed run continues the same run of the tracker. Local files are rewritten from metrics.jsonl; elsewhere (MLflow, W&B
online or synced) the steps that are repeated since the last checkpoint are not sent again, because they equal the first
ones. W&B's measurements of the machine before the interruption are lost with the offline files.
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

_IDS = "trackers.json"  # what the trackers call the run
_MAX_PARAMS = 100  # that MLflow takes at once


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker whose package is not installed (a tracker's name is that of its package and of our extra).

    Raises:
        UserError: names the command that installs it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin it is only a folder of that name
            raise UserError(f"trackers={name} needs a package that is missing: pip install 'cruijff_kit[{name}]'")


@dataclass
class Run:
    """The run as a tracker shows it."""

    experiment: str
    """What the run belongs to."""
    name: str
    """What it is called."""
    folder: Path
    """Where its files are."""
    config: dict[str, Any]
    """The torchtune config."""
    anew: bool
    """Whether a tracker's files in the run's folder may be rewritten."""


class _TensorBoard:
    """Event files `events.out.tfevents.*` in the run's folder; the config is under Text."""

    id, replays = None, True

    def __init__(self, run: Run, id: str | None) -> None:
        if run.anew:
            for old in run.folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.logger = TensorBoardLogger(log_dir=str(run.folder), organize_logs=False)
        if run.anew:
            self.logger._writer.add_text("config", "```\n" + OmegaConf.to_yaml(run.config) + "```")

    def close(self, error: type[BaseException] | None) -> None:
        self.logger.close()


class _WandB:
    """A W&B run in the project of the experiment's name, grouped by the sweep's folder, in `wandb/` of the run's folder."""

    def __init__(self, run: Run, id: str | None) -> None:
        env = os.environ
        offline = env.get("WANDB_MODE", "offline") in ("offline", "dryrun")
        kept = run.folder / "wandb"
        self.id, self.replays = id or uuid.uuid4().hex[:12], offline and not [*kept.rglob("*.synced")]
        if run.anew and self.replays:
            for old in kept.glob("offline-run-*"):
                shutil.rmtree(old, ignore_errors=True)
        if offline:
            env.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports to its makers
        settings = {"mode": "offline", "silent": offline, "console": "off"}
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
        # Else the logger, when it is deleted, would end the run that is open then: the next one.
        del self.logger._wandb


class _MLflow:
    """An MLflow run in the experiment of that name; the config is its parameters."""

    replays = False

    def __init__(self, run: Run, id: str | None) -> None:
        self._before = {k: os.environ.get(k) for k in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE")}
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow, self._ours = mlflow, not mlflow.is_tracking_uri_set()
        store = _mlflow_store(run)
        try:
            if self._ours:
                os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
                mlflow.set_tracking_uri(store.as_uri())
            if id is not None:
                os.environ["MLFLOW_RUN_ID"] = id
            store.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(store.with_name(".mlruns.lock")):  # runs that start together make one experiment
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
                failed = "FAILED" if error is not None and issubclass(error, Exception) else "KILLED"
                self._mlflow.end_run("FINISHED" if error is None else failed)
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)  # where it could not be resumed
            if hasattr(self, "logger") and hasattr(self.logger, "_mlflow"):
                del self.logger._mlflow  # as with W&B
            if self._ours:
                self._mlflow.set_tracking_uri(None)
                for name, value in self._before.items():
                    os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _mlflow_store(run: Run) -> Path:
    """`mlruns` in the experiment's folder; else in the sweep's; else in the run's."""
    experiment, sweep = find_experiment_folder(run.folder, run.experiment), run.folder.parent
    return (experiment or (sweep if (sweep / "sweep.json").exists() else run.folder)) / "mlruns"


_KINDS: dict[str, Callable[[Run, str | None], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class Trackers:
    """The trackers of a run, open from its set-up to its end.

    Args:
        config: the torchtune config, which the trackers show.
        names: which, of tensorboard, wandb, mlflow.
        experiment: what the runs belong to. A run goes by its folder's name.
        again: go on in trackers that were closed, to add something.
    """

    def __init__(self, config: dict[str, Any], names: list[str], experiment: str, again: bool = False) -> None:
        folder = Path(config["output_dir"]).absolute()
        run = Run(experiment, folder.name, folder, config, anew=not again)
        kept = folder / _IDS
        ids = json.loads(kept.read_text()) if (again or config["resume_from_checkpoint"]) and kept.exists() else {}
        self._open: dict[str, Any] = {}
        self._repeats: dict[str, int] = {}  # lines that a tracker has already
        if names and redaction.is_enabled():
            data_policy.refuse_servers()  # what a .env file has brought since the run was checked
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _KINDS[name](run, ids.get(name))
            except Exception as error:
                _warn(name, error)
        if names:
            write_text(kept, json.dumps(ids | {name: t.id for name, t in self._open.items() if t.id}) + "\n")

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

    def go_on(self, lines: list[dict[str, float]], lost: int) -> None:
        """Resume: `lines` were logged before, and `lost` lines after them, which will be logged again."""
        for name, tracker in [*self._open.items()]:
            if not tracker.replays:
                self._repeats[name] = lost
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
        except Exception as trouble:
            if error is None:
                _warn(name, trouble)

    def close(self) -> None:
        """End the run in each; safe to call again. Called while an exception passes, it ends as failed."""
        for name in [*self._open]:
            self._close(name, sys.exc_info()[0])


def _warn(name: str, error: Exception) -> None:
    say(f"{name} failed and is disabled for this run; metrics.jsonl is complete: {one_line(error)}")


class MetricLogger:
    """The metric logger of a recipe: writes metrics.jsonl, and sends to the trackers."""

    def __init__(self, file: MetricsFile, trackers: Trackers) -> None:
        self.file, self.trackers = file, trackers

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write one step's values."""
        self.file.log_dict(payload, step)
        self.trackers.log_dict(payload, step)

    def tell(self) -> int:
        """Return the bytes in metrics.jsonl so far."""
        return self.file.tell()

    def rewind(self, size: int) -> None:
        """Continue after the first `size` bytes of metrics.jsonl."""
        lost = self.file.rewind(size)
        self.trackers.go_on(self.file.lines(), lost)

    def close(self) -> None:
        """Close all; safe to call again."""
        self.file.close()
        self.trackers.close()


def open_metric_logger(cfg: dict[str, Any]) -> MetricLogger:
    """Open the metric logger of a torchtune config."""
    return MetricLogger(instantiate(OmegaConf.create(cfg["metric_logger"])), _trackers(cfg))


def report(recipe: Any, values: dict[str, float]) -> None:
    """Send a finished run's results to its trackers; those of a recipe that trained in other processes are reopened."""
    if not values or not recipe.cfg["trackers"]["names"]:
        return
    metrics = getattr(recipe, "metrics", None)
    trackers = metrics.trackers if metrics is not None else _trackers(recipe.cfg, again=True)
    try:
        trackers.report(values, recipe.summary.steps)
    finally:
        if metrics is None:
            trackers.close()


def _trackers(cfg: dict[str, Any], **more: Any) -> Trackers:
    return instantiate(OmegaConf.create(cfg["trackers"]), cfg, **more)
