"""An experiment on a cluster: planned, approved, submitted, and its summary kept up to date by the jobs themselves."""

import json
import time

from slurm_shell import TINY

from cruijff_kit.records.sweep_manifest import read_sweep_manifest

SUMMARY = "experiment_summary.md"


def test_from_plan_to_summary(shell):
    asked = [
        "train",
        "-m",
        "slurm=cluster",
        "seed=1,2",
        *TINY,
        "experiment.name=plan",
        "experiment.question=Does it work?",
    ]
    planned = shell.run(*asked, "scaffold=true")
    assert planned.returncode == 0, planned.stderr
    (folder,) = (shell.cwd / "multirun" / "plan").iterdir()
    assert not shell.cluster.run("squeue", "--noheader").stdout
    text = (folder / SUMMARY).read_text()
    assert "2 runs: 2 planned" in text and "**Question.** Does it work?" in text
    assert {v["state"] for v in json.loads(shell.run("status", folder, "--json").stdout)} == {"planned"}
    started = shell.run("resume", folder)
    assert started.returncode == 0 and "2 runs submitted to SLURM" in started.stdout, started.stderr
    shell.wait_all(folder, "done")
    end = time.monotonic() + 30  # a job writes it behind its result
    while "2 runs: 2 done" not in (text := (folder / SUMMARY).read_text()) and time.monotonic() < end:
        time.sleep(0.5)
    assert "2 runs: 2 done" in text and "Means over seeds" in text and text.count("| done |") == 2
    assert [len(e.submissions) for e in read_sweep_manifest(folder).runs] == [1, 1]
    assert all(e.estimate["seconds"] > 0 for e in read_sweep_manifest(folder).runs)


def test_what_costs_too_much_is_not_submitted(shell):
    asked = [
        "train",
        "-m",
        "slurm=cluster",
        "seed=1,2",
        "slurm.gpus=1",
        "slurm.partition=gpu",
        *TINY,
        "experiment.name=dear",
    ]
    refused = shell.run(*asked, "max_gpu_hours=0.00001")
    assert refused.returncode == 2 and "GPU-hours" in refused.stderr and "approved=true" in refused.stderr
    assert not shell.cluster.run("squeue", "--noheader").stdout and not (shell.cwd / "multirun" / "dear").exists()
    agreed = shell.run(*asked, "max_gpu_hours=0.00001", "approved=true")
    assert agreed.returncode == 0, agreed.stderr
    (folder,) = (shell.cwd / "multirun" / "dear").iterdir()
    shell.wait_all(folder, "done")
