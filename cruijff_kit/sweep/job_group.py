"""What a SLURM job does whose runs train together: as sweep/job.py for one run, for all of them that are not done.

When the job is stopped each run has its own state, and when it goes on each goes on from there.
"""

import functools
import os
import signal
from pathlib import Path

from cruijff_kit.records import failures
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import (
    CANCELLED,
    FAILED,
    INTERRUPTED,
    QUEUED,
    UNDER_WAY,
    Heartbeat,
    RunStatus,
    cancel_asked,
    mark_queued,
    read_status,
    slurm_job_id,
    write_status,
)
from cruijff_kit.records.saved_config import frozen, frozen_swept
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.runs.multi_lora_runs import GroupRun, run_group
from cruijff_kit.slurm import client
from cruijff_kit.slurm.request import more_memory
from cruijff_kit.sweep.job_common import (
    granted_mb,
    is_elsewhere,
    leave_by,
    may_requeue,
    note_changed_code,
    requeue_all,
    use_granted_processors,
    was_over_memory,
)
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import Cancelled, StopSignals


def start(runs: list[Path], at_once: int | None, code: str, stop: StopSignals) -> int:
    """Train and evaluate the runs; the exit code: 1 if one of them failed.

    Args:
        at_once: most that train at the same time; None: as many as measuring finds best.
        code: hash of the code that submitted them.
    """
    chosen = [run for run in runs if not (is_done(run) or _has_ended(run) or is_elsewhere(run))]
    use_granted_processors()
    begun: list[Heartbeat] = []

    leave_by(stop, lambda: _after_signal(chosen, begun, stop))
    for run in chosen:
        _await_turn(run, code)

    places = [f"[{n}/{len(chosen)}] " for n in range(1, len(chosen) + 1)]
    packed = [
        GroupRun(frozen(run), frozen_swept(run), place, functools.partial(_begin, run))
        for run, place in zip(chosen, places, strict=True)
    ]
    try:
        ended = run_group(packed, at_once and min(at_once, len(chosen)), stop, begun) if chosen else []
    except KeyboardInterrupt:
        return _after_signal(chosen, begun, stop)
    failed = sum(isinstance(result, Exception) for result in ended)
    say(f"{len(ended) - failed} of {len(runs)} runs done in this start")
    return int(failed > 0)


def _begin(run: Path) -> None:
    """Raises Cancelled: somebody cancelled it while it waited for its turn."""
    status = read_status(run)
    if status is not None and status.state == CANCELLED:
        raise Cancelled(f"{run.name} was cancelled before it began")


def _has_ended(run: Path) -> bool:
    """Whether it was cancelled, or failed by itself, in an earlier start of this job."""
    status, result = read_status(run), RunFolder(run).result
    if status is None or status.state not in (CANCELLED, FAILED):
        return False
    return status.state == CANCELLED or (result.exists() and read_result(result).status == FAILED)


def _await_turn(run: Path, code: str) -> None:
    status = read_status(run) or RunStatus(QUEUED)
    if status.state != QUEUED:  # SLURM started the job again
        mark_queued(run, before=status)
        status = read_status(run)
    note_changed_code(status, code)
    status.job_id, status.reason = slurm_job_id(), "its turn in the pack comes"
    write_status(run, status)


def _unfinished(runs: list[Path]) -> dict[Path, RunStatus]:
    """Runs of this job that have not come to an end, or were stopped; what was cancelled by itself is marked so."""
    found = {}
    for run in runs:
        status = read_status(run)
        if status is None or status.state not in (QUEUED, INTERRUPTED, *UNDER_WAY) or is_done(run):
            continue
        if cancel_asked(run):
            status.state, status.reason, status.cause = CANCELLED, "cancelled", None
            write_status(run, status)
        elif status.state not in UNDER_WAY or status.job_id == slurm_job_id():
            found[run] = status
    return found


def _after_signal(runs: list[Path], begun: list[Heartbeat], stop: StopSignals) -> int:
    """The states are saved: go back into the queue, unless SLURM ends the job anyway or nothing comes of it.

    Returns:
        The exit code: 128 + the signal's number.
    """
    received = stop.received or signal.SIGINT
    for heartbeat in begun:
        heartbeat.__exit__()
    left = _unfinished(runs)
    further = any((s.step or 0) > s.first_step for s in left.values()) or len(left) < len(runs)
    reason = f"stopped by {received.name}"
    for run, status in left.items():
        status.retries = 0 if further else status.retries + 1
        if status.state != QUEUED:
            status.state, status.cause = INTERRUPTED, failures.STOPPED
            status.reason = f"{reason} at step {status.step or 0}"
        else:
            status.state, status.reason = INTERRUPTED, f"its pack was {reason} before its turn came"
        write_status(run, status)
    most = min((frozen(run).slurm.max_retries for run in left), default=0)
    requeue_all(left, most, reason, lambda status: f"goes on from step {status.step or 0} ({received.name})")
    return 128 + received


def after_death(runs: list[Path], code: int) -> int:
    """The process has gone with an exit code: say why in each run, and go again if more memory may help."""
    left = {run: status for run, status in _unfinished(runs).items() if status.state != INTERRUPTED}
    began = {run: status for run, status in left.items() if status.state in UNDER_WAY}
    if not left or (not began and not may_requeue()):  # they are on their way back into the queue
        return 0
    if code == 128 + signal.SIGKILL and was_over_memory(max((s.memory_bytes or 0 for s in began.values()), default=0)):
        return _ask_for_more_memory(left)
    most = min(frozen(run).slurm.max_retries for run in left)
    again = code - 128 in (signal.SIGUSR2, signal.SIGTERM) and max(s.retries for s in left.values()) < most
    how = failures.describe_exit(code)
    if again and may_requeue():
        for run, status in left.items():
            status.retries += 1  # it came before Python could listen
            mark_queued(run, f"{how} before it began; again", before=status)
        client.requeue(os.environ["SLURM_JOB_ID"])
        return 0
    for run, status in left.items():
        if run in began or not began:
            status.state, status.cause, status.reason = FAILED, failures.KILLED, f"ended without a result ({how})"
        else:
            status.state, status.reason = INTERRUPTED, f"its pack ended before its turn came ({how})"
        write_status(run, status)
    return 0


def _ask_for_more_memory(left: dict[Path, RunStatus]) -> int:
    """Back into the queue with twice the memory, for all that are not done."""
    granted = granted_mb()
    configs = {run: frozen(run) for run in left}
    mem = {run: status.changes.get("slurm.mem") or configs[run].slurm.mem for run, status in left.items()}
    more = all(status.retries < configs[run].slurm.max_retries for run, status in left.items())
    for run, status in left.items():
        status.reason = f"out of host memory ({mem[run] or f'{granted}M'})"
        status.state, status.cause = FAILED, failures.OUT_OF_MEMORY
        if granted is None or not more:
            write_status(run, status)
            continue
        status.retries += 1
        asked = more_memory(mem[run], granted)
        mark_queued(run, f"{status.reason}; again with {asked}", {"slurm.mem": asked}, status)
    if granted is None or not more:
        return 0
    try:
        client.requeue(os.environ["SLURM_JOB_ID"], mem_mb=2 * granted)
    except ClusterError as error:
        for run, status in left.items():
            status.reason += f", and SLURM would not grant more: {error}; cruijff-kit resume asks for more"
            write_status(run, status)
    return 0
