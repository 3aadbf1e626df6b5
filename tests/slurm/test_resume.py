"""Interrupted in any way, a run ends as one that was not; and nothing that is written is ever half."""

import json
import os
import random
import signal
import time

import torch
from slurm_shell import FAST, LONG, SLOW, TINY

from cruijff_kit.records.result import read_result

STEPS = [SLOW, *TINY, "dataset.max_samples=120", "batch_size=2", "epochs=5"]
TOTAL, ADAPTER = 300, "epoch_4/adapter_model.safetensors"


def kill(shell, run) -> bool:
    """kill -9 of a run's process, if it has one."""
    try:
        os.kill(shell.python_of(run), signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError, TypeError):
        return False
    return True


def check_files(run) -> None:
    """Whatever a run's folder holds can be read."""
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    for path in run.glob("checkpoint/step_*.pt"):
        torch.load(path, weights_only=True)
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    assert all(json.loads(line) for line in lines)


def steps_of(run) -> list[int]:
    """Steps of the loss in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_requeued_three_times_is_never_interrupted(shell):
    """The same bytes as the run that was left alone, here and on the cluster; each step once."""
    folder = shell.submit("out", *STEPS, "run_name=one")
    left = 3
    while left:
        view = shell.wait(folder, lambda v: v["one"]["state"] in ("running", "done"))["one"]
        assert view["state"] == "running", "the run ended before it could be interrupted three times"
        at = view["step"] or 0
        shell.wait(folder, lambda v, at=at: (v["one"]["step"] or 0) > at + 10)
        shell.cluster.run("scancel", "--signal=USR2", view["job_id"])
        shell.wait(folder, lambda v: v["one"]["state"] == "queued")
        left -= 1
    shell.wait_all(folder, "done")
    alone = shell.run("train", *STEPS, "hydra.run.dir=alone", **FAST)
    assert alone.returncode == 0, alone.stderr
    run = folder / "one"
    assert (run / ADAPTER).read_bytes() == (shell.cwd / "alone" / ADAPTER).read_bytes()
    assert steps_of(run) == steps_of(shell.cwd / "alone") == list(range(1, TOTAL + 1))
    result, reference = read_result(run / "result.json"), read_result(shell.cwd / "alone" / "result.json")
    assert result.restarts == 3 and result.metrics() == reference.metrics()
    assert not (run / "checkpoint").exists()


def test_killed_at_ten_moments(shell):
    """kill -9 whenever, ten times: at most the steps since the last checkpoint are made again."""
    draw, trained = random.Random(7), [*STEPS, "eval=none"]
    alone = shell.run("train", *trained, "hydra.run.dir=alone", **FAST)
    assert alone.returncode == 0, alone.stderr
    folder = shell.submit("out", *trained, "run_name=one", "checkpoint_every_n_steps=4")
    run, kills, saved = folder / "one", 0, 0
    while kills < 10:
        shell.wait(folder, lambda v: v["one"]["state"] != "queued")
        time.sleep(draw.uniform(1, 6))
        if not kill(shell, run):
            break
        kills += 1
        view = shell.wait(folder, lambda v: v["one"]["state"] in ("failed", "done"), seconds=30)["one"]
        check_files(run)
        step = max((int(p.stem.partition("_")[2]) for p in run.glob("checkpoint/step_*.pt")), default=0)
        assert step >= saved and (view["step"] or 0) - step <= 4
        saved = step
        resumed = shell.run("resume", folder)
        assert resumed.returncode == 0, resumed.stderr
        if view["state"] == "done":
            break
    assert kills >= 3
    shell.wait_all(folder, "done")
    assert (run / ADAPTER).read_bytes() == (shell.cwd / "alone" / ADAPTER).read_bytes()
    assert steps_of(run) == list(range(1, TOTAL + 1))


def test_resume_runs_exactly_the_rest(shell):
    """Done, failed, cancelled, killed, running, waiting: only what is neither done nor on its way is submitted."""
    slow = ["run_name=slow", *LONG, "epochs=100"]
    folder = shell.submit("out", *TINY, "seed=1,2,3,4", "checkpoint_every_n_steps=1", "epochs=2")
    views = shell.wait_all(folder, "done")
    first = {name: view["job_id"] for name, view in views.items()}
    shell.submit("out", *slow, "seed=10,11,12")
    views = shell.wait(folder, lambda v: all((v[f"slow,seed={n}"]["step"] or 0) > 0 for n in (10, 11, 12)))
    kill(shell, folder / "slow,seed=10")
    shell.cluster.run("scancel", views["slow,seed=11"]["job_id"])
    views = shell.wait(
        folder, lambda v: (v["slow,seed=10"]["state"], v["slow,seed=11"]["state"]) == ("failed", "cancelled")
    )
    assert views["slow,seed=12"]["state"] == "running"
    resumed = shell.run("resume", folder, "slurm.time=00:30:00")
    assert resumed.returncode == 0, resumed.stderr
    assert "2 runs to finish; 1 active" in resumed.stderr and "2 runs submitted" in resumed.stdout
    views = shell.wait(folder, lambda v: all((v[f"slow,seed={n}"]["restarts"] == 1) for n in (10, 11)))
    assert {n: views[n]["job_id"] for n in first} == first and views["slow,seed=12"]["restarts"] == 0
    limit = shell.cluster.run(
        "squeue", "--noheader", "--format=%l", "--jobs", views["slow,seed=10"]["job_id"]
    ).stdout.split()
    assert limit == ["30:00"]
    nothing = shell.run("resume", folder)
    assert "nothing to finish; 3 active" in nothing.stderr and nothing.returncode == 0
    wrong = shell.run("resume", folder, "lr=3")
    assert wrong.returncode == 2 and "lr cannot change in a run that has begun" in wrong.stderr


def test_out_of_gpu_memory_halves_the_micro_batch(shell):
    """The same rows per update in smaller parts, in the same job, and written down; (the GPU's error, without a GPU)."""
    (shell.cwd / "own.py").write_text(
        "import torch\nfrom cruijff_kit.training.loss import LabelledCrossEntropy\n"
        "class Large(LabelledCrossEntropy):\n"
        "    def forward(self, outputs, targets, *more):\n"
        "        if torch.is_grad_enabled() and len(targets) > 12:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "        return super().forward(outputs, targets, *more)\n"
    )
    options = [*TINY, "batch_size=8", "torchtune.loss._component_=own.Large", "hydra.run.dir=out"]
    done = shell.run("train", "slurm=cluster", *options)
    assert done.returncode == 0, done.stderr
    (view,) = shell.wait_all(shell.cwd / "out", "done", "failed").values()
    result = read_result(shell.cwd / "out" / "result.json")
    assert result.status == "done" and result.effective_batch == 8
    changes = result.changes
    assert changes["batch_size"] * changes["gradient_accumulation_steps"] == 8 and changes["batch_size"] < 8
    status = json.loads((shell.cwd / "out" / "status.json").read_text())
    assert status["changes"] == changes and status["restarts"] == 0 and view["restarts"] == 0
    assert "batch_size=" in shell.run("status", "out").stdout


def test_two_gpus_are_two_workers_in_one_task(shell):
    """slurm.gpus=2 trains on two processes (here on the CPU); asked to stop, it saves, and goes on where it was."""
    gpus = ["device=cpu", "slurm.gpus=2", "slurm.cpus=2", "slurm.partition=gpu"]
    folder = shell.submit("two", *LONG, *gpus, "run_name=one")
    view = shell.wait(folder, lambda views: all((v["step"] or 0) > 5 for v in views.values()))["one"]
    allotted = shell.cluster.run("squeue", "--noheader", "--format=%C %D", "--jobs", view["job_id"]).stdout.split()
    assert allotted == ["2", "1"], "CPUs, nodes"
    shell.cluster.run("scancel", "--signal=USR2", view["job_id"])
    at = shell.wait(folder, lambda v: v["one"]["state"] == "queued")["one"]["step"]
    assert at > 5
    shell.wait(folder, lambda v: v["one"]["state"] == "running" and v["one"]["step"] > at, seconds=240)
    steps = steps_of(folder / "one")
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    shell.cluster.run("scancel", view["job_id"])
    shell.wait(folder, lambda v: v["one"]["state"] == "cancelled")
    shell.wait_for_file(folder / "one" / "result.json")
    assert read_result(folder / "one" / "result.json").settings["processes"] == 2
