"""A group of runs on SLURM is one job: files of each run, stop and resume, cancelling one run, and what kills them all."""

import json
import os
import signal

import pytest
from exactness import assert_same_adapters
from slurm_shell import LONG, SLOW, TINY

from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_status import read_status

STEPS = [SLOW, *TINY, "eval=none", "dataset.max_samples=60", "batch_size=2", "epochs=5"]
TOTAL, LAST = 150, "epoch_4"


def steps_of(run) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def without_times(run) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second_per_gpu", "peak_memory_bytes")} for line in lines
    ]


def test_groups_are_jobs_and_leave_what_runs_leave(shell):
    folder = shell.submit("out", *TINY, "seed=1,2,3,4,5", "multi_lora=2")
    submissions = [e["submissions"][-1] for e in json.loads((folder / "sweep.json").read_text())["runs"]]
    assert len({a["job_id"] for a in submissions}) == 3
    views = shell.wait_all(folder, "done")
    assert len(views) == 5
    groups = [read_result(folder / f"seed={n}" / "result.json").multi_lora for n in (1, 2, 3, 4, 5)]
    assert [p and p["size"] for p in groups] == [2, 2, 2, 2, None]
    assert groups[0]["id"] == groups[1]["id"] != groups[2]["id"] == groups[3]["id"]
    for number in (1, 2):
        assert "seed=1 done" in shell.run("logs", folder, f"seed={number}").stdout


def test_a_stopped_group_goes_back_into_the_queue_and_on_exactly(shell):
    """Each as if it had run alone, in a job of its own that nobody stopped."""
    folder = shell.submit("out", *STEPS, "seed=1,2", "multi_lora=2")
    whole = shell.submit("whole", *STEPS, "seed=1,2", "multi_lora=off", "force=true")
    view = shell.wait(folder, lambda v: (v["seed=1"]["step"] or 0) > 10)["seed=1"]
    shell.cluster.run("scancel", "--signal=USR2", view["job_id"])
    stopped = shell.wait(folder, lambda v: all(r["state"] == "queued" for r in v.values()))
    assert all("continues from step" in r["reason"] for r in stopped.values())
    shell.wait_all(folder, "done")
    shell.wait_all(whole, "done")
    for run in ("seed=1", "seed=2"):
        assert_same_adapters(folder / run / LAST, whole / run / LAST)
        assert without_times(folder / run) == without_times(whole / run)
        assert steps_of(folder / run) == list(range(1, TOTAL + 1))
        result = read_result(folder / run / "result.json")
        assert result.restarts == 1 and result.resumed_at_step > 10


def test_one_run_of_a_group_is_cancelled_and_the_others_go_on(shell):
    folder = shell.submit("out", *LONG, "epochs=1", "seed=1,2,3", "multi_lora=3")
    shell.wait(folder, lambda v: all((r["step"] or 0) > 5 for r in v.values()))
    done = shell.run("cancel", folder, "seed=2", "--yes")
    assert done.returncode == 0 and "1 run cancelled" in done.stdout
    view = shell.wait(folder, lambda v: v["seed=2"]["state"] == "cancelled")
    assert view["seed=1"]["state"] == "running"
    shell.wait(folder, lambda v: v["seed=1"]["state"] == v["seed=3"]["state"] == "done")
    assert list((folder / "seed=2" / "checkpoint").glob("step_*.pt")), "its state is saved"
    again = shell.run("resume", folder)
    assert again.returncode == 0, again.stderr
    assert set(shell.wait_all(folder, "done")) == {"seed=1", "seed=2", "seed=3"}
    assert read_result(folder / "seed=2" / "result.json").resumed_at_step > 5


def test_a_run_that_waits_in_a_group_is_cancelled_before_it_begins(shell):
    later = "slurm.additional_parameters.begin=now+1hour"
    folder = shell.submit("out", *TINY, "eval=none", "seed=1,2", "multi_lora=2", later)
    done = shell.run("cancel", folder, "seed=2", "--yes")
    assert done.returncode == 0, done.stderr
    views = shell.wait(folder, lambda v: v["seed=2"]["state"] == "cancelled")
    assert views["seed=1"]["state"] == "queued"
    shell.cluster.run("scontrol", "update", f"jobid={views['seed=1']['job_id']}", "starttime=now")
    shell.wait(folder, lambda v: v["seed=1"]["state"] == "done")
    assert read_status(folder / "seed=2").state == "cancelled" and not (folder / "seed=2" / "metrics.jsonl").exists()


def test_cancelling_a_whole_group_ends_its_job(shell):
    folder = shell.submit("out", *LONG, "seed=1,2", "multi_lora=2")
    shell.wait(folder, lambda v: all((r["step"] or 0) > 5 for r in v.values()))
    assert shell.run("cancel", folder, "--yes").returncode == 0
    shell.wait_all(folder, "cancelled")
    assert all(list((folder / f"seed={n}" / "checkpoint").glob("step_*.pt")) for n in (1, 2))


def test_a_killed_group_resumes_all_its_runs(shell):
    folder = shell.submit("out", *STEPS, "checkpoint_every_n_steps=20", "seed=1,2", "multi_lora=2")
    shell.wait(folder, lambda v: all((r["step"] or 0) > 60 for r in v.values()))
    os.kill(shell.python_of(folder / "seed=1"), signal.SIGKILL)
    views = shell.wait_all(folder, "failed")
    assert all("killed by signal 9" in v["reason"] for v in views.values())
    again = shell.run("resume", folder)
    assert again.returncode == 0, again.stderr
    assert "2 runs in 1 job" in again.stdout
    shell.wait_all(folder, "done")
    for run in ("seed=1", "seed=2"):
        assert steps_of(folder / run) == list(range(1, TOTAL + 1))
        assert read_result(folder / run / "result.json").resumed_at_step >= 60


def test_one_that_fails_leaves_the_others_and_is_left(shell):
    """Also when the job starts again."""
    folder = shell.submit("out", *STEPS, "lr=1e-3,1e30", "multi_lora=2", "num_warmup_steps=0")
    views = shell.wait(folder, lambda v: v["lr=1e+30"]["state"] == "failed" and (v["lr=0.001"]["step"] or 0) > 5)
    assert views["lr=1e+30"]["cause"] == "not_finite" and views["lr=0.001"]["state"] == "running"
    shell.cluster.run("scancel", "--signal=USR2", views["lr=0.001"]["job_id"])
    views = shell.wait(folder, lambda v: v["lr=0.001"]["state"] == "done")
    assert {n: (v["state"], v["restarts"]) for n, v in views.items()} == {
        "lr=0.001": ("done", 1), "lr=1e+30": ("failed", 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "jobs", "why"),
    [
        ([], [1, 1, 1], "parallel jobs finish sooner"),
        (["slurm.gpus=1", "slurm.partition=gpu", "device=auto"], [3], ""),
        (["multi_lora=2"], [2, 1], "the other runs fill their jobs"),
    ],
)
def test_a_dry_run_shows_the_jobs(shell, settings, jobs, why):
    """With multi_lora=auto only runs that request GPUs are grouped."""
    done = shell.run("train", "-m", "slurm=cluster", *TINY, *settings, "seed=1,2,3", "dry_run=true", "--json")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)["groups"]
    assert [len(p["runs"]) for p in groups] == jobs
    assert why in groups[-1]["why"] and bool(why) == bool(groups[-1]["why"])
