"""What a run says and what SLURM says, as one state."""

import pytest

from cruijff_kit.records.run_status import RunStatus
from cruijff_kit.slurm import client, run_states
from cruijff_kit.slurm.client import JobInfo

BEGUN = {"started": "2026-01-01T00:00:00+00:00", "heartbeat": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("said", "slurm", "state", "words"),
    [
        ("running", None, "failed", "gone, and the cluster keeps no record of it"),
        ("queued", None, "cancelled", "left the queue and never started"),
        ("interrupted", None, "interrupted", "before"),
        ("done", None, "done", "before"),
        ("done", JobInfo("7", "FAILED"), "done", "before"),
        ("running", JobInfo("7", "RUNNING"), "running", "no heartbeat for"),
        ("queued", JobInfo("7", "RUNNING"), "running", "starting"),
        ("interrupted", JobInfo("7", "COMPLETING"), "interrupted", "before"),
        ("interrupted", JobInfo("7", "PENDING", "BeginTime"), "queued", "before; BeginTime"),
        ("running", JobInfo("7", "PENDING", "Resources"), "queued", "restarted by SLURM; Resources"),
        ("running", JobInfo("7", "TIMEOUT"), "failed", "time limit"),
        ("running", JobInfo("7", "OUT_OF_MEMORY"), "failed", "out of host memory"),
        ("running", JobInfo("7", "NODE_FAIL"), "failed", "node failed"),
        ("evaluating", JobInfo("7", "FAILED", exit_code=137), "failed", "killed by signal 9"),
        ("running", JobInfo("7", "FAILED", exit_code=3), "failed", "exit code 3"),
        ("running", JobInfo("7", "COMPLETED", exit_code=0), "failed", "without a result"),
        ("interrupted", JobInfo("7", "CANCELLED", "by 0"), "cancelled", "cancelled by 0"),
        ("failed", JobInfo("7", "CANCELLED"), "failed", "before"),
    ],
)
def test_one_state(said, slurm, state, words):
    merged = run_states._merge(RunStatus(said, "before", **BEGUN), slurm, "7")
    assert merged.state == state and words in merged.reason


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04", 93784), ("02:03:04", 7384), ("3:04", 184), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_slurms_times(text, seconds):
    assert client.seconds(text) == seconds


def test_jobs_that_slurm_names_together():
    assert client._array_ids("12", "[0-2,7%4]") == ["12_0", "12_1", "12_2", "12_7"]
    assert client._array_ids("12", "3") == ["12_3"] and client._array_ids("12", "") == ["12"]
