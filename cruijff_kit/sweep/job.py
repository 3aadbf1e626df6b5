"""The program inside a SLURM job; the script that `submit` wrote calls it:

    srun python -m cruijff_kit.sweep.job RUNS.json              train or evaluate the runs of this array task
    python -m cruijff_kit.sweep.job RUNS.json --ended CODE      afterwards, if that failed: say why, perhaps start again

RUNS.json is {"code": hash, "runs": [one entry per array task]}. An entry is {"train": [folders], "at_once": N or null} or
{"evaluate": [folders]}. job_outcome.py decides what becomes of the runs when the job is stopped or dies.
"""

import argparse
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from cruijff_kit.analysis.summary import refresh_sweep_summary
from cruijff_kit.records import failures
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import (
    HEARTBEAT_TIMEOUT,
    UNDER_WAY,
    Heartbeat,
    RunState,
    RunStatus,
    mark_queued,
    read_status,
    seconds_since,
    slurm_job_id,
    write_status,
)
from cruijff_kit.records.saved_config import load_saved_config, load_swept
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.records.versions import code_hash
from cruijff_kit.runs.multi_lora_runs import GroupRun, run_group
from cruijff_kit.runs.posthoc_evaluation import evaluate_pending
from cruijff_kit.runs.run import RunContext, train_then_eval
from cruijff_kit.sweep.job_outcome import EvaluationOutcome, JobOutcome
from cruijff_kit.sweep.job_resources import use_granted_processors, was_over_memory
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.process import collect_garbage_rarely
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import Cancelled, StopSignals


def main(argv: list[str] | None = None) -> int:
    """Run the program of the job; returns its exit code, 128 + N after signal N."""
    stop = StopSignals(signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    stop.interrupt_now = lambda: None
    stop.install()  # before anything slow: without a handler these signals kill; now they wait for _exit_on_signal
    parser = argparse.ArgumentParser("python -m cruijff_kit.sweep.job")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--ended", type=int)
    options = parser.parse_args(argv)
    collect_garbage_rarely()
    listed = json.loads(options.runs.read_text(encoding="utf-8"))
    entry = listed["runs"][int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)]
    evaluates = "evaluate" in entry
    runs = [Path(run) for run in entry["evaluate" if evaluates else "train"]]
    if options.ended is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # accompanies the requeue that this may request
        (EvaluationOutcome if evaluates else JobOutcome)(runs).on_exit(options.ended)
        return 0
    if evaluates:
        return evaluate(runs, stop)
    if len(runs) == 1:
        return train(runs[0], listed["code"], stop)
    return train_group(runs, entry["at_once"], listed["code"], stop)


def _exit_on_signal(stop: StopSignals, outcome: JobOutcome) -> None:
    """End the process on a signal that arrives when there is no state to save, or that has already arrived."""

    def exit_now() -> NoReturn:
        code = outcome.on_signal(stop.received)
        sys.stderr.flush()
        os._exit(code)

    stop.interrupt_now = exit_now
    if stop.received is not None:
        exit_now()


def train(run: Path, code: str, stop: StopSignals) -> int:
    """Train and evaluate one run; returns the exit code.

    Args:
        code: hash of the code that submitted it.
    """
    if is_done(run):
        say(f"{run} is done already")
        return 0
    if _is_elsewhere(run):
        return 1
    use_granted_processors()
    heartbeat = Heartbeat(run)
    _note_changed_code(heartbeat.status, code)
    outcome = JobOutcome([run])
    outcome.heartbeats.append(heartbeat)
    heartbeat.__enter__()  # before the imports, which take seconds
    _exit_on_signal(stop, outcome)
    try:
        result = train_then_eval(load_saved_config(run, agent=False), load_swept(run), RunContext(heartbeat, stop))
        say(f"done: {result.outcome}")
        return 0
    except KeyboardInterrupt:
        return outcome.on_signal(stop.received or signal.SIGINT)
    except Exception as error:
        cause = failures.find_cause(error)
        heartbeat.__exit__()
        if cause == failures.KILLED and was_over_memory(heartbeat.status.memory_bytes):  # a worker process died
            outcome.retry_with_more_memory({run: read_status(run)})
            return 1
        reason = f"{type(error).__name__}: {one_line(error)}"
        heartbeat.set(state=RunState.FAILED, reason=reason, cause=cause)
        say(f"failed: {reason}")
        return 1
    finally:
        heartbeat.__exit__()
        refresh_sweep_summary(run)


def train_group(runs: list[Path], at_once: int | None, code: str, stop: StopSignals) -> int:
    """Train runs together and evaluate each; returns the exit code, 1 if one of them failed.

    Each run saves its own state when the job is stopped, and continues from it when the job starts again.

    Args:
        at_once: most runs that train at the same time; None: as many as measuring finds best.
        code: hash of the code that submitted them.
    """
    pending = [run for run in runs if not (is_done(run) or _has_ended(run) or _is_elsewhere(run))]
    use_granted_processors()
    outcome = JobOutcome(pending)
    _exit_on_signal(stop, outcome)
    for run in pending:
        _wait_for_slot(run, code)
    group = [
        GroupRun(
            load_saved_config(run, agent=False),
            load_swept(run),
            f"[{n}/{len(pending)}] ",
            functools.partial(_refuse_cancelled, run),
        )
        for n, run in enumerate(pending, 1)
    ]
    try:
        ended = run_group(group, at_once and min(at_once, len(pending)), stop, outcome.heartbeats) if pending else []
    except KeyboardInterrupt:
        return outcome.on_signal(stop.received or signal.SIGINT)
    failed = sum(isinstance(result, Exception) for result in ended)
    say(f"{len(ended) - failed} of {len(runs)} runs done in this start")
    return int(failed > 0)


def evaluate(runs: list[Path], stop: StopSignals) -> int:
    """Evaluate finished runs one after another: their base model is read once. Returns the exit code, 1 if one failed."""
    use_granted_processors()
    outcome = EvaluationOutcome(runs)
    _exit_on_signal(stop, outcome)
    unevaluated_runs = outcome.find_unevaluated_runs()
    for number, run in enumerate(unevaluated_runs, 1):
        label = f"[{number}/{len(unevaluated_runs)}] {run.name}"
        say(label)
        try:
            evaluate_pending(run, RunContext(Heartbeat(run), stop), agent=False)
            outcome.num_evaluated += 1
        except Exception as error:
            say(f"{label} failed: {one_line(error)}")
    say(f"{outcome.num_evaluated} of {len(unevaluated_runs)} runs evaluated")
    return int(outcome.num_evaluated < len(unevaluated_runs))


def _is_elsewhere(run: Path) -> bool:
    """Return whether another job trains this run now."""
    status = read_status(run)
    is_elsewhere = status is not None and status.state in UNDER_WAY and status.job_id != slurm_job_id()
    if not is_elsewhere or (seconds_since(status.heartbeat) or 0) >= HEARTBEAT_TIMEOUT:
        return False
    say(f"{run} is already active, as job {status.job_id} on {status.host}")
    return True


def _has_ended(run: Path) -> bool:
    """Return whether the run was cancelled, or failed with a result, in an earlier start of this job."""
    status, result = read_status(run), RunFolder(run).result
    if status is None or status.state not in (RunState.CANCELLED, RunState.FAILED):
        return False
    return status.state == RunState.CANCELLED or (result.exists() and read_result(result).status == RunState.FAILED)


def _note_changed_code(status: RunStatus, code: str) -> None:
    """Add a warning if the code differs from that at submission."""
    if code != code_hash():
        note = "the code of cruijff_kit changed between submission and start"
        status.notes = [*(n for n in status.notes if n != note), note]
        say(f"warning: {note}")


def _wait_for_slot(run: Path, code: str) -> None:
    status = read_status(run) or RunStatus(RunState.QUEUED)
    if status.state != RunState.QUEUED:  # SLURM started the job again
        mark_queued(run, previous=status)
        status = read_status(run)
    _note_changed_code(status, code)
    status.job_id, status.reason = slurm_job_id(), "waiting for a slot in its group"
    write_status(run, status)


def _refuse_cancelled(run: Path) -> None:
    """Raise Cancelled if the run was cancelled while it waited for its slot."""
    status = read_status(run)
    if status is not None and status.state == RunState.CANCELLED:
        raise Cancelled(f"{run.name} was cancelled before it started")


if __name__ == "__main__":
    raise SystemExit(main())
