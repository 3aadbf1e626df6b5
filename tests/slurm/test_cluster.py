"""The clusters that other tests use are real: jobs run on them, and fail on them, as they do elsewhere."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """Submits a shell command, whose output is thrown away; returns the id of the job."""
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").stdout.strip()


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def job_state(cluster: Cluster, job: str) -> str:
    """State and exit code of a job, like `FAILED 3:0`."""
    shown = cluster.run("scontrol", "show", "job", job).stdout
    return " ".join(re.search(rf"\b{key}=(\S+)", shown)[1] for key in ("JobState", "ExitCode"))


def end_of(cluster: Cluster, job: str) -> str:
    """Waits for a job; returns its last state."""
    wait_for(lambda: job_state(cluster, job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"))
    return job_state(cluster, job)


@pytest.mark.parametrize("name", ["slurm", "slurm_bare"])
def test_jobs_run_and_fail(name, request):
    cluster = request.getfixturevalue(name)
    good, bad = submit(cluster, "true"), submit(cluster, "exit 3")
    assert end_of(cluster, good) == "COMPLETED 0:0"
    assert end_of(cluster, bad) == "FAILED 3:0"


def test_sacct_needs_accounting(slurm, slurm_bare):
    job = submit(slurm, "exit 3")
    sacct = ("sacct", "-X", "-n", "-P", "-j", job, "-o", "account,state,exitcode")
    wait_for(lambda: slurm.run(*sacct).stdout == "lab|FAILED|3:0\n")
    with pytest.raises(ClusterError, match="accounting storage is disabled"):
        slurm_bare.run("sacct")


def test_clusters_know_nothing_of_each_other(slurm, slurm_bare):
    job = submit(slurm, "true", "--hold", "--job-name=only-here")
    assert "only-here" in slurm.run("squeue", "--format=%j").stdout
    assert "only-here" not in slurm_bare.run("squeue", "--format=%j").stdout
    slurm.run("scancel", job)


def test_gpu_nodes_give_gpus(slurm, tmp_path):
    output = tmp_path / "output"
    job = submit(slurm, "echo $CUDA_VISIBLE_DEVICES", "-p", "gpu", "--gpus=2", "-C", "a100", f"--output={output}")
    assert end_of(slurm, job) == "COMPLETED 0:0"
    assert output.read_text() == "0,1\n"


def test_limits_of_the_books_hold(slurm):
    jobs = [submit(slurm, "true", "--hold", "--qos=few") for _ in range(3)]
    with pytest.raises(ClusterError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(slurm, "true", "--qos=few")
    slurm.run("scancel", *jobs)
    with pytest.raises(ClusterError, match="Invalid account"):
        submit(slurm, "true", "--account=nobody")


def test_preemption_requeues(slurm_bare):
    whole_node = ("--exclusive", "--nodelist=c3")
    low = submit(slurm_bare, "sleep 60", "--partition=preempt", *whole_node)
    wait_for(lambda: "RUNNING" in job_state(slurm_bare, low))
    assert end_of(slurm_bare, submit(slurm_bare, "true", "--partition=cpu", *whole_node)) == "COMPLETED 0:0"
    assert "Restarts=1" in slurm_bare.run("scontrol", "show", "job", low).stdout
    slurm_bare.run("scancel", low)


def test_jobs_outlive_a_controller_and_a_slurmd(slurm_bare, tmp_path):
    job = submit(slurm_bare, f"until [ -e {tmp_path}/end ]; do sleep 0.1; done", "--nodelist=c2")
    wait_for(lambda: "RUNNING" in job_state(slurm_bare, job))
    for daemon in ("slurmctld", "slurmd-c2"):
        slurm_bare.kill_daemon(daemon)
        slurm_bare.start_daemon(daemon)
    (tmp_path / "end").touch()
    assert end_of(slurm_bare, job) == "COMPLETED 0:0"


def test_a_cluster_ends_with_the_process_that_holds_it(tmp_path):
    script = f"""
import os, signal, sys, time
from cluster import Cluster
with Cluster(accounting=False, max_array_size=5) as cluster:
    print(cluster.state)
    assert cluster.run("sbatch", "--array=0-5", "--wrap=true", check=False).returncode
    cluster.run("sbatch", "--array=0-4", "--output={tmp_path}/%a", "--wrap=echo $$; sleep 60")
    while sum(os.path.exists(f"{tmp_path}/{{task}}") for task in range(5)) < 5:
        time.sleep(0.05)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    state = killed.stdout.strip()
    wait_for(lambda: not Path(state).exists())
    commands = [read(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if state in command]  # daemons, and the scripts of jobs


def read(path: Path) -> str:
    """Text of a file of /proc; empty when its process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
