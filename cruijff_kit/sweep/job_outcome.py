"""Handle a SLURM job that is stopped or dies: retry its runs within the limits, and set their states and reasons.

A job that exceeds its host memory is requeued with twice the memory. A job that a signal stopped is requeued and continues
from its checkpoints. Other failures are not retried. (The recipe handles a lack of GPU memory with smaller micro-batches.)
"""

import os
import signal
from pathlib import Path

from cruijff_kit.records import failures
from cruijff_kit.records.run_status import (
    UNDER_WAY,
    Heartbeat,
    RunState,
    RunStatus,
    is_cancel_requested,
    mark_queued,
    read_status,
    slurm_job_id,
    write_status,
)
from cruijff_kit.records.saved_config import load_saved_config
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.runs.evaluation_request import NAME as EVALUATION_REQUEST
from cruijff_kit.runs.evaluation_request import read_request
from cruijff_kit.slurm import client
from cruijff_kit.slurm.request import double_memory
from cruijff_kit.sweep.job_resources import can_requeue, granted_mb, was_over_memory
from cruijff_kit.util.errors import ClusterError

Statuses = dict[Path, RunStatus]


class JobOutcome:
    """Runs that a job trains, one or several, which end with it."""

    def __init__(self, runs: list[Path]) -> None:
        self.runs = runs
        self.heartbeats: list[Heartbeat] = []
        """Heartbeats of the runs that have started; `on_signal` ends them."""

    def on_signal(self, received: signal.Signals) -> int:
        """Requeue the job after a signal, unless SLURM ends it anyway or its retries are used up.

        The states of the runs have been saved.

        Returns:
            The exit code: 128 + the signal's number.
        """
        for heartbeat in self.heartbeats:
            heartbeat.__exit__()
        statuses = self.find_unfinished_runs()
        has_progress = self.has_progress(statuses)
        for run, status in statuses.items():
            status.retries = 0 if has_progress else status.retries + 1
            if status.state == RunState.QUEUED:
                status.reason = f"its job was stopped by {received.name} before the run started"
            else:
                status.reason = f"stopped by {received.name}{self.progress_of(status)}"
                status.cause = failures.STOPPED
            status.state = RunState.INTERRUPTED
            write_status(run, status)
        self._requeue(statuses, received.name)
        return 128 + received

    def _requeue(self, statuses: Statuses, signal_name: str) -> None:
        try:
            if not statuses or not can_requeue():  # SLURM requeues what it preempts; `status` tells what was cancelled
                return
            retries = max(s.retries for s in statuses.values())
            if retries > self._max_retries(statuses):
                for run, status in statuses.items():
                    status.reason += f", the {retries}th time without getting further; with more time: "
                    status.reason += "cruijff-kit resume DIR slurm.time=HH:MM:SS"
                    write_status(run, status)
                return
            for run, status in statuses.items():
                mark_queued(run, f"{self.next_start_of(status)} ({signal_name})")
            client.requeue(os.environ["SLURM_JOB_ID"])
        except ClusterError as error:
            for run, status in statuses.items():
                status.reason += f", and SLURM would not requeue it: {error}"
                write_status(run, status)

    def on_exit(self, code: int) -> None:
        """Record why each run ended that could not record it itself, and requeue the job if a retry may succeed.

        Args:
            code: exit code of the process; 128 + N is signal N.
        """
        statuses = {
            run: status for run, status in self.find_unfinished_runs().items() if status.state != RunState.INTERRUPTED
        }
        started = {run: status for run, status in statuses.items() if status.state in UNDER_WAY}
        if not statuses or (not started and not can_requeue()):  # the job is on its way back into the queue
            return
        memory = max((s.memory_bytes or 0 for s in started.values()), default=0)
        if code == 128 + signal.SIGKILL and was_over_memory(memory):
            self.retry_with_more_memory(statuses)
            return
        is_early = code - 128 in (signal.SIGUSR2, signal.SIGTERM)  # the signal came before Python handled it
        exit_text = failures.describe_exit(code)
        if is_early and max(s.retries for s in statuses.values()) < self._max_retries(statuses) and can_requeue():
            for run, status in statuses.items():
                status.retries += 1
                mark_queued(run, f"{exit_text} before it started; retrying", previous=status)
            client.requeue(os.environ["SLURM_JOB_ID"])
            return
        for run, status in statuses.items():
            self.mark_dead(status, exit_text, is_waiting=bool(started) and run not in started)
            write_status(run, status)

    def retry_with_more_memory(self, statuses: Statuses) -> None:
        """Requeue the job with twice the memory; the runs fail where retries are used up or SLURM refuses.

        Args:
            statuses: of all runs that are not done.
        """
        granted, mem = granted_mb(), self._requested_memory(statuses)
        can_retry = granted is not None and max(s.retries for s in statuses.values()) < self._max_retries(statuses)
        for run, status in statuses.items():
            status.state, status.cause = RunState.FAILED, failures.OUT_OF_MEMORY
            status.reason = f"out of host memory ({mem[run] or f'{granted}M'})"
            if not can_retry:
                write_status(run, status)
        if not can_retry:
            return
        more = {run: double_memory(mem[run], granted) for run in statuses}
        for run, status in statuses.items():
            status.retries += 1
            mark_queued(run, f"{status.reason}; retrying with {more[run]}", {"slurm.mem": more[run]}, status)
        try:
            client.requeue(os.environ["SLURM_JOB_ID"], mem_mb=2 * granted)
        except ClusterError as error:
            for run, status in statuses.items():
                status.reason += f", and SLURM would not grant more: {error}; cruijff-kit resume requests {more[run]}"
                write_status(run, status)

    def _requested_memory(self, statuses: Statuses) -> dict[Path, str | None]:
        return {
            run: status.changes.get("slurm.mem") or load_saved_config(run).slurm.mem for run, status in statuses.items()
        }

    def _max_retries(self, statuses: Statuses) -> int:
        return min(self.max_retries_of(run) for run in statuses)

    def find_unfinished_runs(self) -> Statuses:
        """Return the runs of this job that are queued, under way or stopped; mark a run that was cancelled alone."""
        statuses = {}
        for run in self.runs:
            status = read_status(run)
            if (
                status is None
                or status.state not in (RunState.QUEUED, RunState.INTERRUPTED, *UNDER_WAY)
                or is_done(run)
            ):
                continue
            if is_cancel_requested(run):
                status.state, status.reason, status.cause = RunState.CANCELLED, "cancelled", None
                write_status(run, status)
            elif status.state not in UNDER_WAY or status.job_id == slurm_job_id():
                statuses[run] = status
        return statuses

    def has_progress(self, statuses: Statuses) -> bool:
        """Return whether this start made progress: a run made a step, or ended."""
        return any((s.step or 0) > s.first_step for s in statuses.values()) or len(statuses) < len(self.runs)

    def max_retries_of(self, run: Path) -> int:
        """Return slurm.max_retries of a run."""
        return load_saved_config(run).slurm.max_retries

    def progress_of(self, status: RunStatus) -> str:
        """Return the progress of a stopped run, as the end of its reason."""
        return f" at step {status.step or 0}"

    def next_start_of(self, status: RunStatus) -> str:
        """Return the next action of a requeued run."""
        return f"continues from step {status.step or 0}"

    def mark_dead(self, status: RunStatus, exit_text: str, is_waiting: bool) -> None:
        """Set the state of a run whose process is gone.

        Args:
            is_waiting: other runs of the job had started, this one had not.
        """
        if is_waiting:
            status.state, status.reason = RunState.INTERRUPTED, f"its job ended before the run started ({exit_text})"
            return
        began = "" if status.started else " before it started; see its log"
        status.state, status.cause = RunState.FAILED, failures.KILLED
        status.reason = f"ended without a result ({exit_text}){began}"


class EvaluationOutcome(JobOutcome):
    """Finished runs that a job evaluates one after another.

    evaluate.json stays in the folder of each run until its evaluation is complete, so that the next start can continue.
    """

    def __init__(self, runs: list[Path]) -> None:
        super().__init__(runs)
        self.num_evaluated = 0
        """Runs that this start has evaluated."""

    def find_unevaluated_runs(self) -> list[Path]:
        """Return the runs whose evaluation is not complete."""
        return [run for run in self.runs if (run / EVALUATION_REQUEST).exists()]

    def find_unfinished_runs(self) -> Statuses:
        """Return the queued and active runs whose evaluation is not complete; not those that failed in this start."""
        statuses = {run: read_status(run) for run in self.find_unevaluated_runs()}
        return {run: s for run, s in statuses.items() if s is not None and s.state in (RunState.QUEUED, *UNDER_WAY)}

    def retry_with_more_memory(self, statuses: Statuses) -> None:
        """Mark the runs as failed instead: `resume` requests more memory."""
        for run, status in statuses.items():
            self.mark_dead(status, failures.describe_exit(128 + signal.SIGKILL), is_waiting=False)
            status.cause = failures.OUT_OF_MEMORY
            write_status(run, status)

    def has_progress(self, statuses: Statuses) -> bool:
        """Return whether this start evaluated a run."""
        return self.num_evaluated > 0

    def max_retries_of(self, run: Path) -> int:
        """Return slurm.max_retries of the evaluation."""
        return read_request(run).slurm["max_retries"]

    def progress_of(self, status: RunStatus) -> str:
        """Return no text: the step in the status is of the training."""
        return ""

    def next_start_of(self, status: RunStatus) -> str:
        """Return the next action of a requeued run."""
        return "evaluation continues"

    def mark_dead(self, status: RunStatus, exit_text: str, is_waiting: bool) -> None:
        """Set the state as after training; waiting runs failed too."""
        status.state, status.cause = RunState.FAILED, failures.KILLED
        status.reason = f"post-hoc evaluation: {exit_text}"
