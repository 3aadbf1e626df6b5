"""status, logs and cancel: at a terminal and away from one, with and without accounting, on a cluster and here."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_shell import LONG, TINY, Shell

HOLD = "slurm.additional_parameters.hold=true"


def test_cancel_asks_at_a_terminal(shell):
    folder = shell.submit("out", *TINY, "seed=1,2,3", HOLD)
    unsure = shell.run("cancel", folder)
    assert unsure.returncode == 2 and "3 runs would be cancelled (seed=1, seed=2, seed=3); add --yes" in unsure.stderr
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "cruijff_kit", "cancel", folder]
    for stdout, *more in ((subprocess.PIPE,), (terminal, "--json")):  # to a program; to one that wants JSON
        done = subprocess.run(
            [*command, *more], stdin=terminal, stdout=stdout, stderr=subprocess.PIPE, env=shell.environment, timeout=60
        )
        assert done.returncode == 2 and b"add --yes" in done.stderr
    assert json.loads(os.read(master, 10_000))["error"]["fix"] == "add --yes"
    command = [sys.executable, "-m", "cruijff_kit", "cancel", folder, "seed=2"]
    for answer, expected in (("n", "nothing was cancelled"), ("y", "1 run cancelled")):
        os.write(master, f"{answer}\n".encode())
        there = {"env": shell.environment, "cwd": shell.cwd, "timeout": 60}
        done = subprocess.run(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, **there)
        said = os.read(master, 10_000).decode()
        assert expected in said and "cancel 1 runs (seed=2)? [y/N]" in said, done.stderr
    states = {name: v["state"] for name, v in shell.views(folder).items()}
    assert states == {"seed=1": "queued", "seed=2": "cancelled", "seed=3": "queued"}
    wrong = shell.run("cancel", folder, "seed=7", "--yes")
    assert wrong.returncode == 2 and "no run is called seed=7" in wrong.stderr
    everything = shell.run("cancel", folder, "--yes")
    assert "2 runs cancelled" in everything.stdout and everything.returncode == 0
    assert {v["state"] for v in shell.views(folder).values()} == {"cancelled"}
    assert "nothing to cancel" in shell.run("cancel", folder, "--yes").stdout


@pytest.mark.parametrize("where", ["shell", "bare_shell"])
def test_a_whole_array_that_is_cancelled_from_outside(where, request):
    """SLURM names its jobs together then."""
    shell = request.getfixturevalue(where)
    folder = shell.submit("out", *TINY, "seed=range(1,6)", HOLD)
    base = shell.views(folder)["seed=1"]["job_id"].partition("_")[0]
    shell.cluster.run("scancel", f"{base}_2")
    shell.cluster.run("scancel", base)
    views = shell.wait_all(folder, "cancelled", seconds=30)
    assert len(views) == 5


def test_without_accounting(bare_shell):
    """The same answers: done, killed, cancelled; and a job that SLURM has forgotten."""
    folder = bare_shell.submit("out", *LONG, "seed=1,2,3", "epochs=100")
    bare_shell.submit("out", *TINY, "run_name=short")
    views = bare_shell.wait(folder, lambda v: all((v[f"seed={s}"]["step"] or 0) > 0 for s in (1, 2, 3)))
    os.kill(bare_shell.python_of(folder / "seed=1"), 9)
    bare_shell.cluster.run("scancel", views["seed=2"]["job_id"])
    views = bare_shell.wait(folder, lambda v: v["seed=2"]["state"] == "cancelled" and v["short"]["state"] == "done")
    assert views["seed=1"]["state"] == "failed" and "killed by signal 9" in views["seed=1"]["reason"]
    batch = bare_shell.cluster.run("scontrol", "--oneliner", "show", "job", views["seed=3"]["job_id"]).stdout
    assert "JobState=RUNNING" in batch
    subprocess.run(["pkill", "-9", "-f", rf"sweep.job {re.escape(str(folder))}"])
    views = bare_shell.wait(folder, lambda v: v["seed=3"]["state"] == "failed", seconds=30)
    assert bare_shell.run("resume", folder).stdout.startswith("3 runs submitted")


def test_the_cluster_forgets(tmp_path, environment, slurm_packages):
    """Without accounting SLURM forgets a job soon; it is not called queued for ever."""
    with Cluster(accounting=False, min_job_age=2) as cluster:
        shell = Shell(cluster, tmp_path, environment)
        folder = shell.submit("out", *TINY, HOLD)
        (view,) = shell.views(folder).values()
        cluster.run("scancel", view["job_id"])
        deadline = time.monotonic() + 60
        while cluster.run("scontrol", "show", "job", view["job_id"], check=False).returncode == 0:
            assert time.monotonic() < deadline
            time.sleep(1)
        (view,) = shell.views(folder).values()
        assert view["state"] == "cancelled" and "left the queue and never started" in view["reason"]
        assert "1 run submitted" in shell.run("resume", folder).stdout


def test_logs_follow(shell):
    folder = shell.submit("out", *TINY, "seed=1", "run_name=one")
    followed = shell.run("logs", folder, "--follow")
    assert followed.returncode == 0 and followed.stdout.count("done: validation_loss") == 1
    assert followed.stdout == shell.run("logs", folder, "one").stdout


def test_watch_ends_with_the_runs(shell):
    folder = shell.submit("out", *TINY, "seed=1", "lr=1e-3,1e30", "lr_scheduler=constant", "epochs=3")
    watched = shell.run("status", folder, "--watch")
    assert watched.returncode == 1
    assert "2 runs: " in watched.stdout and "1 done" in watched.stdout and "1 failed" in watched.stdout


def test_status_of_runs_that_ran_here(shell):
    done = shell.run("train", "-m", *TINY[:-2], "seed=1,2", "hydra.sweep.dir=here")
    assert done.returncode == 0, done.stderr
    views = shell.views(shell.cwd / "here")
    assert {n: (v["state"], v["step"], v["job_id"]) for n, v in views.items()} == {
        "seed=1": ("done", 2, None), "seed=2": ("done", 2, None),
    }  # fmt: skip
    nothing = shell.run("status", shell.cwd / "nowhere")
    assert nothing.returncode == 2 and nothing.stderr == f"error: no such folder: {shell.cwd / 'nowhere'}\n"
    log = shell.run("logs", "here", "seed=1")
    assert log.returncode == 2 and "was not submitted to SLURM" in log.stderr
    process = shell.start(
        "train", "-m", *LONG[:-5], *LONG[-3:], "epochs=200", "seed=1,2", "multi_lora=off", "hydra.sweep.dir=killed"
    )
    folder = shell.cwd / "killed"
    shell.wait_for_file(folder / "seed=1" / "metrics.jsonl")
    assert shell.views(folder)["seed=1"]["state"] == "running"
    assert "press Ctrl-C where it was started" in shell.run("cancel", folder, "--yes").stderr
    process.kill()
    process.wait()
    views = shell.views(folder)
    assert views["seed=1"]["state"] == "failed" and "is gone" in views["seed=1"]["reason"]
    assert views["seed=2"]["state"] == "interrupted" and json.loads(Path(folder, "sweep.json").read_text())["runs"]
