"""What becomes of the runs of a job that is stopped or dies; there is no cluster: scontrol is a script."""

import dataclasses
import signal
from pathlib import Path

import pytest

from cruijff_kit import compose
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import RunStatus, read_status, request_cancel, write_status
from cruijff_kit.runs.evaluation_request import EvaluationRequest, write_request
from cruijff_kit.sweep.job_outcome import EvaluationOutcome, JobOutcome

STARTED = "2026-01-01T00:00:00+00:00"
KILLED = 128 + signal.SIGKILL


class Job:
    """Job 7 on a cluster that answers with one state."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny, self._calls = folder, tiny, folder / "calls"
        self.answer("RUNNING")

    def answer(self, state: str) -> None:
        script = self.folder / "scontrol"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {self._calls}\necho JobId=7 JobState={state} RunTime=00:01:00 TimeLimit=01:00:00\n'
        )
        script.chmod(0o755)

    def refuse(self) -> None:
        script = self.folder / "scontrol"
        script.write_text(script.read_text() + 'case "$1" in requeue) echo "Access denied" >&2; exit 1;; esac\n')

    @property
    def changes(self) -> list[str]:
        """The calls that change the job."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if not line.startswith("--oneliner show")]

    def run(self, name: str, state: str, evaluates: bool = False, **fields: object) -> Path:
        """A run of the job in some state."""
        run = self.folder / name
        overrides = [
            "model=hf_llama",
            f"model.path={self.tiny}",
            "slurm=cluster",
            "slurm.mem=100M",
            f"output_dir={run}",
        ]
        config = compose(overrides, None)
        RunFolder(run).freeze(config, {})
        if evaluates:
            write_request(run, EvaluationRequest(dataclasses.asdict(config.eval), dataclasses.asdict(config.slurm)))
        job_id = None if state == "queued" else "7"
        write_status(run, RunStatus(state, job_id=job_id, started=STARTED if job_id else None, **fields))
        return run


@pytest.fixture
def job(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return Job(tmp_path, tiny)


def states(*runs: Path) -> list[tuple[str, int]]:
    """(state, retries) of each run."""
    return [(status.state, status.retries) for status in map(read_status, runs)]


def test_a_signal_requeues_what_got_further(job):
    run = job.run("a", "running", step=7, first_step=3, retries=2)
    assert JobOutcome([run]).on_signal(signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert states(run) == [("queued", 0)] and job.changes == ["requeue 7"]
    status = read_status(run)
    assert status.reason == "continues from step 7 (SIGUSR2)" and status.restarts == 1
    assert status.history[0]["reason"] == "stopped by SIGUSR2 at step 7" and status.history[0]["cause"] == "stopped"


def test_retries_without_progress_end(job):
    run = job.run("a", "running", step=3, first_step=3, retries=2)
    JobOutcome([run]).on_signal(signal.SIGUSR2)
    assert states(run) == [("queued", 3)] and job.changes == ["requeue 7"]
    write_status(run, dataclasses.replace(read_status(run), state="running", job_id="7", started=STARTED, first_step=3))
    JobOutcome([run]).on_signal(signal.SIGUSR2)
    assert states(run) == [("interrupted", 4)] and len(job.changes) == 1
    assert "at step 3, the 4th time without getting further; with more time:" in read_status(run).reason


def test_a_cancelled_job_is_not_requeued(job):
    job.answer("CANCELLED")
    run, waits = job.run("a", "running", step=7), job.run("b", "queued")
    JobOutcome([run, waits]).on_signal(signal.SIGTERM)
    assert states(run, waits) == [("interrupted", 0), ("interrupted", 0)] and job.changes == []
    assert read_status(run).reason == "stopped by SIGTERM at step 7"
    assert read_status(waits).reason == "its job was stopped by SIGTERM before the run started"


def test_slurm_refuses_to_requeue(job):
    job.refuse()
    run = job.run("a", "running", step=7)
    JobOutcome([run]).on_signal(signal.SIGUSR2)
    assert states(run) == [("interrupted", 0)]
    assert "at step 7, and SLURM would not requeue it: Access denied" in read_status(run).reason


def test_a_run_of_another_job_and_a_cancelled_one_are_left(job):
    other, cancelled, run = job.run("a", "running"), job.run("b", "running"), job.run("c", "running", step=2)
    write_status(other, dataclasses.replace(read_status(other), job_id="8"))
    request_cancel(cancelled)
    JobOutcome([other, cancelled, run]).on_signal(signal.SIGUSR2)
    assert [state for state, _ in states(other, cancelled, run)] == ["running", "cancelled", "queued"]


def test_a_killed_process(job):
    """The run that had started failed, the one that waited did not."""
    run, waits = job.run("a", "running", memory_bytes=50 * 2**20), job.run("b", "queued")
    JobOutcome([run, waits]).on_exit(KILLED)
    assert states(run, waits) == [("failed", 0), ("interrupted", 0)] and job.changes == []
    assert read_status(run).reason == "ended without a result (killed by signal 9)"
    assert read_status(run).cause == "killed"
    assert read_status(waits).reason == "its job ended before the run started (killed by signal 9)"


def test_a_process_that_never_began(job):
    run = job.run("a", "queued")
    JobOutcome([run]).on_exit(1)
    assert read_status(run).reason == "ended without a result (exit code 1) before it started; see its log"


def test_a_signal_before_python_handles_it(job):
    run = job.run("a", "queued")
    JobOutcome([run]).on_exit(128 + signal.SIGTERM)
    assert states(run) == [("queued", 1)] and job.changes == ["requeue 7"]
    job.answer("PENDING")  # it is on its way back
    JobOutcome([run]).on_exit(128 + signal.SIGTERM)
    assert states(run) == [("queued", 1)] and job.changes == ["requeue 7"]


def test_over_memory(job):
    run, waits = job.run("a", "running", memory_bytes=95 * 2**20), job.run("b", "queued")
    JobOutcome([run, waits]).on_exit(KILLED)
    assert states(run, waits) == [("queued", 1), ("queued", 1)]
    assert job.changes == ["requeue 7", "update JobId=7 MinMemoryNode=200"]
    assert read_status(run).changes == {"slurm.mem": "200M"}
    assert read_status(run).reason == "out of host memory (100M); retrying with 200M"
    assert read_status(run).history[0]["cause"] == "out_of_memory"


def test_over_memory_without_retries_left_and_refused(job):
    run = job.run("a", "running", memory_bytes=95 * 2**20, retries=3)
    JobOutcome([run]).on_exit(KILLED)
    assert states(run) == [("failed", 3)] and job.changes == []
    job.refuse()
    run = job.run("b", "running", memory_bytes=95 * 2**20)
    JobOutcome([run]).on_exit(KILLED)
    assert read_status(run).state == "failed" and "cruijff-kit resume requests 200M" in read_status(run).reason


def test_evaluations(job):
    """They go on after a signal, fail together when they are killed, and are not retried with more memory."""
    first, second = job.run("a", "evaluating", evaluates=True, step=7), job.run("b", "queued", evaluates=True)
    assert EvaluationOutcome([first, second]).on_signal(signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert states(first, second) == [("queued", 1), ("queued", 1)] and job.changes == ["requeue 7"]
    assert read_status(first).reason == "evaluation continues (SIGUSR2)"
    for memory, cause in ((50, "killed"), (95, "out_of_memory")):
        first = job.run("a", "evaluating", evaluates=True, memory_bytes=memory * 2**20)
        second = job.run("b", "queued", evaluates=True)
        EvaluationOutcome([first, second]).on_exit(KILLED)
        assert [s.cause for s in map(read_status, (first, second))] == [cause, cause]
        assert {s.reason for s in map(read_status, (first, second))} == {"post-hoc evaluation: killed by signal 9"}
    assert job.changes == ["requeue 7"]


def test_evaluations_that_got_further_have_all_their_retries(job):
    run = job.run("a", "evaluating", evaluates=True, retries=3)
    outcome = EvaluationOutcome([run])
    outcome.num_evaluated = 1
    outcome.on_signal(signal.SIGUSR2)
    assert states(run) == [("queued", 0)]
