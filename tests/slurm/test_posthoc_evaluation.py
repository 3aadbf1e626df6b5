"""Post-hoc evaluation on a cluster: one job for the runs of a base model, which goes on wherever it is stopped."""

import json

from slurm_shell import TINY

from cruijff_kit.records.result import read_result

LATE = ("eval=capitalization", "eval.limit=4", "eval.baseline=false", "eval.epochs=all")


def made(run) -> list[tuple[str, int]]:
    """(task, epoch) of a run's cells."""
    return [(e.task, e.epoch) for e in read_result(run / "result.json").evaluation]


def trained(shell, *more: str):
    """Two runs of two epochs on the cluster, only trained."""
    folder = shell.submit("out", *TINY, "eval=none", "lora.rank=2,4", "epochs=2", "epochs_to_save=all", *more)
    shell.wait_all(folder, "done")
    return folder


def test_where_the_sweep_ran(shell):
    """Both runs in one job; status, logs and the manifest know of it; twice is once."""
    folder = trained(shell)
    done = shell.run("evaluate", folder, *LATE)
    assert done.returncode == 0, done.stderr
    assert "2 runs submitted to SLURM" in done.stdout and "2 runs in 1 job" in done.stdout
    again = shell.run("evaluate", folder, *LATE)
    assert again.returncode == 0 or "an evaluation is active" in again.stderr
    views = shell.wait_all(folder, "done", "failed")
    assert {v["state"] for v in views.values()} == {"done"} and len({v["job_id"] for v in views.values()}) == 1
    assert [made(folder / name) for name in ("rank=2", "rank=4")] == [
        [("capitalization", 0), ("capitalization", 1)]
    ] * 2
    manifest = json.loads((folder / "sweep.json").read_text())
    assert [e["submissions"][-1]["reason"] for e in manifest["runs"]] == ["evaluate"] * 2
    log = shell.run("logs", folder, "rank=4")
    assert "2 of 2 runs evaluated" in log.stdout
    nothing = shell.run("evaluate", folder, *LATE)
    assert nothing.returncode == 0 and "every cell exists already" in nothing.stderr
    here = shell.run("evaluate", folder, "eval=match", "eval.limit=2", "eval.baseline=false", "slurm.submit=false")
    assert here.returncode == 0, here.stderr
    assert ("match", 1) in made(folder / "rank=2")


def test_refused_and_cancelled(shell):
    """SLURM's refusal leaves the runs as they were; what is cancelled, resume makes."""
    folder = trained(shell)
    refused = shell.run("evaluate", folder, *LATE, "slurm.partition=nowhere")
    assert refused.returncode == 3 and "slurm.partition" in refused.stderr
    assert {v["state"] for v in shell.views(folder).values()} == {"done"}
    assert not list(folder.glob("*/evaluate.json"))
    held = shell.run("evaluate", folder, *LATE, "slurm.additional_parameters.begin=now+1hour")
    assert held.returncode == 0, held.stderr
    shell.wait_all(folder, "queued")
    assert shell.run("cancel", folder, "--yes").returncode == 0
    shell.wait_all(folder, "cancelled")
    assert read_result(folder / "rank=2" / "result.json").status == "done"
    resumed = shell.run("resume", folder, "slurm.additional_parameters={}")
    assert resumed.returncode == 0, resumed.stderr
    shell.wait_all(folder, "done")
    assert made(folder / "rank=4") == [("capitalization", 0), ("capitalization", 1)]


def test_stopped_in_the_middle(shell):
    """USR2 puts the job back into the queue, kill -9 makes what is left failed; each cell is made once."""
    folder = trained(shell)
    many = ("eval.tasks=[capitalization,match]", "eval.baseline=false", "eval.epochs=all", "eval.max_tokens=64")
    done = shell.run("evaluate", folder, *many)
    assert done.returncode == 0, done.stderr
    view = shell.wait(folder, lambda v: v["rank=2"]["state"] == "evaluating")["rank=2"]
    shell.cluster.run("scancel", "--signal=USR2", view["job_id"])
    shell.wait(folder, lambda v: v["rank=2"]["state"] in ("queued", "done"))
    shell.wait_all(folder, "done")
    expected = [(task, epoch) for task in ("capitalization", "match") for epoch in (0, 1)]
    for name in ("rank=2", "rank=4"):
        assert made(folder / name) == expected
        assert len(list((folder / name / "eval").glob("*.eval"))) == 4
    restarted = read_result(folder / "rank=2" / "result.json")
    assert restarted.status == "done" and restarted.posthoc_error is None


def test_an_adapter_and_a_base_model(shell):
    """Alone they are jobs too; the folder is a run's, and what SLURM refuses leaves none."""
    adapter = trained(shell) / "rank=2" / "epoch_1"
    asked = (*TINY, "slurm=cluster", "eval=capitalization")
    for place, more in ([adapter], ["eval.baseline=false"]), ([], ["eval.baseline=true"]):
        where = shell.cwd / f"alone{len(place)}"
        done = shell.run("evaluate", *place, *asked, *more, f"output_dir={where}")
        assert done.returncode == 0 and "1 run submitted to SLURM" in done.stdout, done.stderr
        shell.wait_all(where, "done")
        result = read_result(where / "result.json")
        assert result.status == "done" and len(result.evaluation) + len(result.baseline) == 1
    refused = shell.run("evaluate", adapter, *asked, "slurm.partition=nowhere", f"output_dir={shell.cwd / 'no'}")
    assert refused.returncode == 3 and not (shell.cwd / "no").exists()
