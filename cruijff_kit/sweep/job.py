"""What a SLURM job runs; the script that `submit` wrote calls it:

    srun python -m cruijff_kit.sweep.job RUNS.json              the run of this array task, a pack of runs (pack_job), or
                                                                  post-hoc evaluations (evaluation_job)
    python -m cruijff_kit.sweep.job RUNS.json --ended CODE      afterwards, if that failed: why, and whether to go again

Retries, by cause: over host memory is requeued with twice the memory; what a signal stopped is requeued and goes on from
its checkpoint; everything else is left as it is. (Out of GPU memory is the recipe's to mend: smaller micro-batches.)
"""

import argparse
import json
import os
import signal
from pathlib import Path

from cruijff_kit.analysis.summary import refresh_above
from cruijff_kit.config.data_policy import submitted
from cruijff_kit.records import failures
from cruijff_kit.records.run_status import (
    FAILED,
    INTERRUPTED,
    QUEUED,
    UNDER_WAY,
    Heartbeat,
    mark_queued,
    read_status,
    slurm_job_id,
    write_status,
)
from cruijff_kit.records.saved_config import frozen, frozen_swept
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.runs.run import RunContext, train_then_eval
from cruijff_kit.slurm import client
from cruijff_kit.slurm.request import more_memory
from cruijff_kit.sweep import job_evaluation, job_group
from cruijff_kit.sweep.job_common import (
    granted_mb,
    is_elsewhere,
    leave_by,
    may_requeue,
    note_changed_code,
    use_granted_processors,
    was_over_memory,
)
from cruijff_kit.util.errors import ClusterError, one_line
from cruijff_kit.util.process import collect_rarely
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import StopSignals


def main(argv: list[str] | None = None) -> int:
    """The job's program; returns its exit code."""
    stop = StopSignals(signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    stop.interrupt_now = lambda: None
    stop.install()  # before anything slow: without a handler these signals kill; with this one they wait for `_run`
    parser = argparse.ArgumentParser("python -m cruijff_kit.sweep.job")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--ended", type=int)
    options = parser.parse_args(argv)
    submitted()
    collect_rarely()
    listed = json.loads(options.runs.read_text(encoding="utf-8"))
    chosen = listed["runs"][int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)]
    if options.ended is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes with the requeue that this may ask for
    if isinstance(chosen, dict):
        runs = [Path(run) for run in chosen["pack"]]
        if options.ended is not None:
            return job_group.after_death(runs, options.ended)
        return job_group.start(runs, chosen["at_once"] or None, listed["code"], stop)
    if isinstance(chosen, list):
        runs = [Path(run) for run in chosen]
        return (
            job_evaluation.start(runs, stop)
            if options.ended is None
            else job_evaluation.after_death(runs, options.ended)
        )
    run = Path(chosen)
    return _start(run, listed["code"], stop) if options.ended is None else _after_death(run, options.ended)


def _start(run: Path, code: str, stop: StopSignals) -> int:
    if is_done(run):
        say(f"{run} is done already")
        return 0
    if is_elsewhere(run):
        return 1
    use_granted_processors()
    heartbeat = Heartbeat(run)
    note_changed_code(heartbeat.status, code)
    return _run(run, heartbeat, stop)


def _run(run: Path, heartbeat: Heartbeat, stop: StopSignals) -> int:
    leave_by(stop, lambda: _after_signal(run, heartbeat, stop))
    heartbeat.__enter__()  # before the imports, which take seconds
    try:
        result = train_then_eval(frozen(run), frozen_swept(run), RunContext(heartbeat, stop))
        say(f"done: {result.outcome}")
        return 0
    except KeyboardInterrupt:
        return _after_signal(run, heartbeat, stop)
    except Exception as error:
        cause = failures.cause_of(error)
        if cause == failures.KILLED and was_over_memory(heartbeat.status.memory_bytes):
            heartbeat.__exit__()
            _ask_for_more_memory(run)
            return 1
        heartbeat.set(state=FAILED, reason=f"{type(error).__name__}: {one_line(error)}", cause=cause)
        say(f"failed: {type(error).__name__}: {one_line(error)}")
        return 1
    finally:
        heartbeat.__exit__()
        refresh_above(run)


def _after_signal(run: Path, heartbeat: Heartbeat, stop: StopSignals) -> int:
    """The state is saved: go back into the queue, unless SLURM ends the job anyway or nothing comes of it.

    Returns:
        The exit code: 128 + the signal's number.
    """
    received = stop.received or signal.SIGINT
    name, status, most = received.name, heartbeat.status, frozen(run).slurm.max_retries
    status.retries = 0 if (status.step or 0) > status.first_step else status.retries + 1
    reason = f"stopped by {name} at step {status.step or 0}"
    heartbeat.set(state=INTERRUPTED, reason=reason, cause=failures.STOPPED)
    heartbeat.__exit__()
    code = 128 + received
    try:
        if not may_requeue():  # SLURM requeues what it preempts, and `status` tells what a person cancelled
            return code
        if status.retries > most:
            heartbeat.set(
                reason=f"{reason}, the {status.retries}th time without getting further; with more time: "
                "cruijff-kit resume DIR slurm.time=HH:MM:SS"
            )
            return code
        mark_queued(run, f"goes on from step {status.step or 0} ({name})")
        client.requeue(os.environ["SLURM_JOB_ID"])
    except ClusterError as error:
        heartbeat.set(state=INTERRUPTED, reason=f"{reason}, and SLURM would not requeue it: {error}")
    return code


def _after_death(run: Path, code: int) -> int:
    """The run's process has gone with an exit code: say why where it could not, and go again if more memory may help."""
    status = read_status(run)
    if status is None or status.state not in (QUEUED, *UNDER_WAY):
        return 0
    if status.state == QUEUED and not may_requeue():  # it is on its way back into the queue
        return 0
    if status.state in UNDER_WAY and status.job_id != slurm_job_id():
        return 0
    how = failures.describe_exit(code)
    if code == 128 + signal.SIGKILL and was_over_memory(status.memory_bytes):
        return _ask_for_more_memory(run)
    if (
        code - 128 in (signal.SIGUSR2, signal.SIGTERM)
        and status.retries < frozen(run).slurm.max_retries
        and may_requeue()
    ):
        status.retries += 1  # it came before Python could listen
        mark_queued(run, f"{how} before it began; again", before=status)
        client.requeue(os.environ["SLURM_JOB_ID"])
        return 0
    began = "" if status.started else " before it began; see its log"
    status.state, status.reason, status.cause = FAILED, f"ended without a result ({how}){began}", failures.KILLED
    write_status(run, status)
    return 0


def _ask_for_more_memory(run: Path) -> int:
    config, status = frozen(run), read_status(run)
    granted = granted_mb()
    asked = status.changes.get("slurm.mem") or config.slurm.mem
    reason = f"out of host memory ({asked or f'{granted}M'})"
    status.state, status.reason, status.cause = FAILED, reason, failures.OUT_OF_MEMORY
    if status.retries >= config.slurm.max_retries or granted is None:
        write_status(run, status)
        return 0
    status.retries += 1
    mem = more_memory(asked, granted)
    mark_queued(run, f"{reason}; again with {mem}", {"slurm.mem": mem}, status)
    try:
        client.requeue(os.environ["SLURM_JOB_ID"], mem_mb=2 * granted)
    except ClusterError as error:
        status.reason = f"{reason}, and SLURM would not grant more: {error}; cruijff-kit resume asks for {mem}"
        write_status(run, status)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
