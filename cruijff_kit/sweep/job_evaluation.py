"""What a SLURM job does that evaluates finished runs, one after another in one process: their base model is read once.

What a run waits for stands in its folder (late.Request) until it is done, so a job that goes on finds what is left.
"""

import signal
from pathlib import Path

from cruijff_kit.records import failures
from cruijff_kit.records.run_status import FAILED, INTERRUPTED, QUEUED, UNDER_WAY, Heartbeat, read_status, write_status
from cruijff_kit.runs.posthoc_evaluation import NAME, evaluate_pending, read_request
from cruijff_kit.runs.run import RunContext
from cruijff_kit.sweep.job_common import leave_by, may_requeue, requeue_all, use_granted_processors, was_over_memory
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import StopSignals


def start(runs: list[Path], stop: StopSignals) -> int:
    """Evaluate what the runs wait for; the exit code: 1 if something could not be made."""
    use_granted_processors()
    finished = 0

    leave_by(stop, lambda: _after_signal(_waiting(runs), finished, stop))
    waiting = _waiting(runs)
    for place, run in enumerate(waiting, 1):
        say(f"[{place}/{len(waiting)}] {run.name}")
        try:
            evaluate_pending(run, RunContext(Heartbeat(run), stop))
            finished += 1
        except Exception as error:
            say(f"[{place}/{len(waiting)}] {run.name} failed: {one_line(error)}")
    failed = len(waiting) - finished
    say(f"{finished} of {len(waiting)} runs evaluated")
    return int(failed > 0)


def _waiting(runs: list[Path]) -> list[Path]:
    return [run for run in runs if (run / NAME).exists()]


def _after_signal(runs: list[Path], finished: int, stop: StopSignals) -> int:
    """Go back into the queue, unless SLURM ends the job anyway or nothing comes of it; the exit code."""
    received = stop.received or signal.SIGINT
    reason = f"stopped by {received.name}"
    statuses = {run: status for run in runs if (status := read_status(run)) and status.state in (QUEUED, *UNDER_WAY)}
    for run, status in statuses.items():
        status.retries = 0 if finished else status.retries + 1
        status.state, status.reason, status.cause = INTERRUPTED, reason, failures.STOPPED
        write_status(run, status)
    most = min((read_request(run).slurm["max_retries"] for run in statuses), default=0)
    requeue_all(statuses, most, reason, lambda _: f"evaluation goes on ({received.name})")
    return 128 + received


def after_death(runs: list[Path], code: int) -> int:
    """The process has gone with an exit code: say why in each run that it did not come to an end with."""
    left = {run: status for run in _waiting(runs) if (status := read_status(run))}
    if any(s.state == QUEUED for s in left.values()) and not may_requeue():  # it is on its way back into the queue
        return 0
    for run, status in left.items():
        if status.state not in (QUEUED, *UNDER_WAY):
            continue
        killed = code == 128 + signal.SIGKILL and was_over_memory(status.memory_bytes)
        status.state, status.cause = FAILED, failures.OUT_OF_MEMORY if killed else failures.KILLED
        status.reason = f"post-hoc evaluation: {failures.describe_exit(code)}"
        write_status(run, status)
    return 0
