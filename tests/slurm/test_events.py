"""What can happen to a job: every event leaves a run that says what happened, and goes on from where it was."""

import json
import os
import signal
import time

import pytest
from slurm_shell import LONG, TINY

from cruijff_kit.records.result import read_result

EVENTS = ["killed", "usr2", "term", "requeued", "cancelled", "cancelled_waiting"]


@pytest.fixture(scope="module")
def sweep(module_shell):
    """Runs that are all training; each test does something to one of them. And one that waits."""
    seeds = ",".join(str(i + 1) for i in range(len(EVENTS)))
    limit = f"slurm.max_parallel={len(EVENTS) - 1}"
    folder = module_shell.submit("events", *LONG, f"seed={seeds}", limit, "checkpoint_every_n_steps=5")
    module_shell.wait(folder, lambda views: sum((v["step"] or 0) > 5 for v in views.values()) == len(EVENTS) - 1)
    return folder


def name(event: str) -> str:
    """Of the event's run."""
    return f"seed={EVENTS.index(event) + 1}"


def went_on(view: dict, at: int) -> bool:
    """Whether a run trains again, further than it was."""
    return view["state"] == "running" and view["restarts"] == 1 and view["step"] > at


def test_cancelled_while_waiting(module_shell, sweep):
    run = name("cancelled_waiting")
    view = module_shell.views(sweep)[run]
    assert view["state"] == "queued" and view["reason"] == "JobArrayTaskLimit"
    module_shell.cluster.run("scancel", view["job_id"])
    view = module_shell.wait(sweep, lambda v: v[run]["state"] == "cancelled")[run]
    assert view["step"] is None


def test_kill_9(module_shell, sweep):
    run = name("killed")
    os.kill(module_shell.python_of(sweep / run), signal.SIGKILL)
    killed = time.monotonic()
    view = module_shell.wait(sweep, lambda v: v[run]["state"] == "failed")[run]
    assert time.monotonic() - killed < 30
    assert view["reason"] == "ended without a result (killed by signal 9)" and view["cause"] == "killed"
    while (state := module_shell.slurm_state(view["job_id"])) in ("RUNNING", "COMPLETING"):
        assert time.monotonic() - killed < 30
    assert state == "FAILED"
    assert list((sweep / run / "checkpoint").glob("step_*.pt"))


@pytest.mark.parametrize("event", ["usr2", "term"])
def test_a_signal_saves_and_requeues(module_shell, sweep, event):
    run = name(event)
    job = module_shell.views(sweep)[run]["job_id"]
    module_shell.cluster.run("scancel", f"--signal={event.upper().removeprefix('SIG')}", job)
    view = module_shell.wait(sweep, lambda v: v[run]["state"] == "queued")[run]
    at = view["step"]
    assert at > 5 and view["restarts"] == 1 and f"continues from step {at} (SIG{event.upper()})" in view["reason"]
    view = module_shell.wait(sweep, lambda v: went_on(v[run], at))[run]
    assert view["job_id"] == job
    status = json.loads((sweep / run / "status.json").read_text())
    assert status["first_step"] == at and status["retries"] == 0
    assert [h["step"] for h in status["history"]] == [at]
    steps = [json.loads(line)["step"] for line in (sweep / run / "metrics.jsonl").read_text().splitlines()]
    losses = [s for s in steps if steps.count(s) == 1]
    assert sorted(losses) == losses
    module_shell.cluster.run("scancel", job)


def test_scontrol_requeue(module_shell, sweep):
    run = name("requeued")
    job = module_shell.views(sweep)[run]["job_id"]
    module_shell.cluster.run("scontrol", "requeue", job)
    view = module_shell.wait(sweep, lambda v: v[run]["state"] == "queued")[run]
    at = view["step"]
    view = module_shell.wait(sweep, lambda v: went_on(v[run], at))[run]
    assert view["restarts"] == 1
    module_shell.cluster.run("scancel", job)


def test_cancelled_from_outside(module_shell, sweep):
    run = name("cancelled")
    module_shell.cluster.run("scancel", module_shell.views(sweep)[run]["job_id"])
    cancelled = time.monotonic()
    module_shell.wait(sweep, lambda v: v[run]["state"] == "cancelled")
    assert time.monotonic() - cancelled < 30
    saved = sorted((sweep / run / "checkpoint").glob("step_*.pt"))
    assert (
        saved and int(saved[-1].stem.partition("_")[2]) == json.loads((sweep / run / "status.json").read_text())["step"]
    )


def test_over_memory_asks_for_more(shell):
    folder = shell.submit("memory", *TINY, "slurm.mem=400M", "seed=1")
    view = shell.wait(folder, lambda v: next(iter(v.values()))["restarts"] == 1)
    view = next(iter(view.values()))
    assert (
        view["changes"] == {"slurm.mem": "800M"} and "out of host memory (400M); retrying with 800M" in view["reason"]
    )
    shell.wait_all(folder, "done")
    (result,) = folder.glob("*/result.json")
    assert read_result(result).restarts >= 1 and read_result(result).changes["slurm.mem"] in ("800M", "1600M")


def test_errors_are_failed_jobs(shell):
    """A NaN, a user's error that shows only in the job, an exit: FAILED with a code, the reason in words, no retry."""
    (shell.cwd / "own.py").write_text(
        "import sys\nfrom cruijff_kit.training.loss import LabelledCrossEntropy\n"
        "def leaving(**more):\n    if 'SLURM_JOB_ID' in __import__('os').environ:\n        sys.exit(3)\n"
        "    return LabelledCrossEntropy(**more)\n"
    )
    folder = shell.cwd / "errors"
    nan = [*TINY, "lr=1e30", "lr_scheduler=constant", "epochs=3", "run_name=nan"]
    done = shell.run("train", "slurm=cluster", *nan, f"hydra.run.dir={folder / 'nan'}")
    assert done.returncode == 0, done.stderr
    leaving = [*TINY, "run_name=leaving", "torchtune.loss._component_=own.leaving"]
    done = shell.run(
        "train", "slurm=cluster", *leaving, f"hydra.run.dir={folder / 'leaving'}", PYTHONPATH=str(shell.cwd)
    )
    assert done.returncode == 0, done.stderr
    views = shell.wait_all(folder, "failed")
    assert "FloatingPointError: the loss is nan" in views["nan"]["reason"] and views["nan"]["cause"] == "not_finite"
    assert views["leaving"]["reason"].startswith("SystemExit: 3")
    for view in views.values():
        assert view["restarts"] == 0
        accounts = ("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", view["job_id"])
        assert shell.cluster.run(*accounts).stdout.split() in (["FAILED|1:0"], ["FAILED|3:0"], ["RUNNING|0:0"])
    table = shell.run("table", folder)
    assert "nan" in table.stdout and "smaller lr" in table.stdout


def test_time_limit(shell):
    """The signal comes before the limit, the state is saved, and the job goes on in a second life."""
    folder = shell.submit("limit", *LONG, "epochs=200", "slurm.time=1", "seed=1")
    view = next(iter(shell.wait(folder, lambda v: next(iter(v.values()))["restarts"] == 1).values()))
    assert "SIGUSR2" in view["reason"]
    # On a machine that is busy with other tests, the first life may end before its first step.
    shell.wait(folder, lambda v: (next(iter(v.values()))["step"] or 0) > 0, seconds=150)


def test_node_failure(shell):
    """SLURM requeues the job itself; (this cluster's nodes are back at once)."""
    shell.patience = 10
    folder = shell.submit("node", *LONG, "seed=1", "checkpoint_every_n_steps=5")
    (run,) = views = shell.wait(folder, lambda v: (next(iter(v.values()))["step"] or 0) > 5)
    node = views[run]["node"]
    shell.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        view = shell.wait(folder, lambda v: v[run]["state"] == "queued", seconds=30)[run]
        at = view["step"]
        view = shell.wait(folder, lambda v: went_on(v[run], at))[run]
        assert view["restarts"] == 1
    finally:
        shell.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)


def test_preemption(shell):
    folder = shell.submit("preempted", *LONG, "seed=1", "slurm.partition=preempt", "slurm.nodelist=c2")
    (run,) = shell.wait(folder, lambda v: (next(iter(v.values()))["step"] or 0) > 5)
    urgent = ("sbatch", "--parsable", "--output=/dev/null", "--nodelist=c2", "--exclusive", "--wrap=sleep 3")
    shell.cluster.run(*urgent)
    view = shell.wait(folder, lambda v: v[run]["restarts"] == 1 or v[run]["state"] == "queued")[run]
    at = view["step"]
    view = shell.wait(folder, lambda v: went_on(v[run], at))[run]
    assert json.loads((folder / run / "status.json").read_text())["first_step"] >= at > 5


def test_slurmctld_restarts(shell):
    folder = shell.submit("restart", *LONG, "epochs=3", "seed=1")
    (run,) = shell.wait(folder, lambda v: (next(iter(v.values()))["step"] or 0) > 5)
    shell.cluster.kill_daemon("slurmctld")
    blind = time.monotonic()
    done = shell.run("status", folder)
    assert time.monotonic() - blind < 30 and done.returncode == 0
    assert "SLURM does not answer" in done.stdout and "running" in done.stdout
    shell.cluster.start_daemon("slurmctld")
    shell.wait_all(folder, "done")
