"""status.json: what a run is doing, written by the run itself every few seconds. RunStatus is its schema.

    planned (there is no file yet) -> queued -> running -> evaluating -> done
    and from any of them: failed, cancelled, interrupted (its state is saved; the next start continues from it)

Imports nothing heavy: commands that look at a thousand runs read it.
"""

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.format import now
from cruijff_kit.util.process import MEMORY_METER


class RunState(StrEnum):
    """State of a run."""

    PLANNED = "planned"
    QUEUED = "queued"
    RUNNING = "running"
    EVALUATING = "evaluating"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """Its state is saved."""


ACTIVE = (RunState.QUEUED, RunState.RUNNING, RunState.EVALUATING)
UNDER_WAY = (RunState.RUNNING, RunState.EVALUATING)
SECONDS_BETWEEN_BEATS = 3.0
_SECONDS_BETWEEN_SAMPLES = 0.3  # of memory, which grows by hundreds of megabytes a second while torch is imported
_CANCEL = ".cancel"
HEARTBEAT_TIMEOUT = 25.0  # without a heartbeat for so long, something is wrong


@dataclass
class RunStatus:
    """A run at one moment; times in UTC, ISO 8601."""

    state: str
    """queued, running, evaluating, done, failed, cancelled or interrupted."""
    reason: str | None = None
    """Why it is in that state, in one line."""
    cause: str | None = None
    """The reason as one of cruijff_kit.records.failures.CAUSES."""
    job_id: str | None = None
    """Id of the SLURM job, such as 17_3; None for a run outside a cluster."""
    host: str | None = None
    pid: int | None = None
    step: int | None = None
    """Number of updates that are done."""
    total_steps: int | None = None
    epoch: int | None = None
    """Current epoch, counted from 0."""
    epochs: int | None = None
    loss: float | None = None
    """Loss of the last update, per labelled token."""
    first_step: int = 0
    """Step at which this start continued."""
    started: str | None = None
    """Time of this start."""
    training_since: str | None = None
    heartbeat: str = ""
    """Time at which this file was last written."""
    restarts: int = 0
    """Number of times that the run was started again."""
    retries: int = 0
    """Number of automatic restarts without progress; slurm.max_retries limits it."""
    memory_bytes: int | None = None
    """Most host memory that the process and its workers held in this start."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that retries changed: batch_size, gradient_accumulation_steps, slurm.mem."""
    notes: list[str] = field(default_factory=list)
    """Warnings, for example that the code changed after submission."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The starts before this one: job_id, started, ended, state, reason, cause, step, changes."""


def read_status(run: Path) -> RunStatus | None:
    """Return the status in a run's folder; None if it has no readable status.json."""
    try:
        return RunStatus(**json.loads(RunFolder(run).status.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_status(run: Path, status: RunStatus) -> None:
    """Write status.json, with the present as its heartbeat."""
    status.heartbeat = now()
    RunFolder(run).write("status.json", json.dumps(dataclasses.asdict(status), indent=1) + "\n")


def request_cancel(run: Path) -> None:
    """Request that a run which shares its process with others saves its state and stops."""
    (run / _CANCEL).touch()


def is_cancel_requested(run: Path) -> bool:
    """Return whether a cancellation of the run was requested."""
    return (run / _CANCEL).exists()


def clear_cancel_request(run: Path) -> None:
    """Remove the request, because the run has stopped or starts again."""
    (run / _CANCEL).unlink(missing_ok=True)


def seconds_since(time_stamp: str | None) -> float | None:
    """Seconds since a time of ours; None for none."""
    return (datetime.now(UTC) - datetime.fromisoformat(time_stamp)).total_seconds() if time_stamp else None


def slurm_job_id() -> str | None:
    """Return the id of this process's SLURM job, as squeue shows it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def mark_queued(
    run: Path, reason: str | None = None, changes: dict[str, Any] | None = None, previous: RunStatus | None = None
) -> None:
    """Mark a run as queued; its previous status is added to its history.

    Args:
        run: the run's folder.
        reason: why the run is queued; not recorded for its first start.
        changes: settings that the next start changes, in addition to earlier changes.
        previous: the run's status; None reads it from the folder.
    """
    clear_cancel_request(run)
    previous = previous or read_status(run)
    status = previous if previous and previous.state == RunState.QUEUED and not previous.started else _next(previous)
    status.state, status.reason = RunState.QUEUED, reason if previous else None
    status.changes |= changes or {}
    write_status(run, status)


def _next(previous: RunStatus | None) -> RunStatus:
    """Return the status of the start after `previous`."""
    if previous is None or not previous.started:
        return dataclasses.replace(previous, cause=None) if previous else RunStatus(RunState.QUEUED)
    names = ("step", "total_steps", "epoch", "epochs", "loss", "retries", "notes")
    past = {k: getattr(previous, k) for k in ("job_id", "started", "state", "reason", "cause", "step")}
    past |= {"ended": previous.heartbeat, "changes": dict(previous.changes)}
    return RunStatus(
        RunState.QUEUED,
        **{k: getattr(previous, k) for k in names},
        changes=dict(previous.changes),
        restarts=previous.restarts
        + (previous.state != RunState.DONE),  # a done run starts only for a post-hoc evaluation
        history=[*previous.history, past],
    )


class Heartbeat:
    """Context that keeps a run's status.json up to date while the run is active.

    A thread writes the file every few seconds, so that a reader can tell a long step from a dead process.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        previous = read_status(self.run)
        self.status = previous if previous and previous.state == RunState.QUEUED else _next(previous)
        self.status.state, self.status.reason, self.status.cause = RunState.RUNNING, None, None
        self.status.job_id, self.status.pid = slurm_job_id(), os.getpid()
        self.status.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.status.started = now()
        self._look: Callable[[], dict[str, Any]] = dict
        # Reentrant: a signal's handler may have to write while its own thread is writing.
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        if not self._thread.is_alive():
            self.set()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=3)

    def follow(self, look: Callable[[], dict[str, Any]]) -> None:
        """Write the fields that `look()` returns, at each beat and each `set`."""
        self._look = look

    def set(self, **fields: Any) -> None:
        """Change fields and write at once."""
        with self._lock:
            for name, value in {**self._look(), **fields}.items():
                setattr(self.status, name, value)
            write_status(self.run, self.status)

    def _beat(self) -> None:
        written_bytes = 0
        last = time.monotonic()
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            self.status.memory_bytes = max(self.status.memory_bytes or 0, MEMORY_METER.measure())
            # Growth is written at once: a process that is killed for its memory leaves no second chance.
            grown = self.status.memory_bytes > 1.02 * written_bytes
            if grown or time.monotonic() - last >= SECONDS_BETWEEN_BEATS:
                written_bytes, last = self.status.memory_bytes, time.monotonic()
                try:
                    self.set()
                except OSError:  # a full or an absent disk for a moment; the run has its own complaint to make
                    continue
