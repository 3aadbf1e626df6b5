"""Red data on a cluster: nothing of it in the jobs' logs and the runs' folders; who may give the command is asked once."""

import os
import stat

import canaries
from slurm_shell import TINY

from cruijff_kit.records.result import read_result


def contents(folder) -> dict[str, bytes]:
    """Files below a folder that hold a canary."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    return {str(p): content for p in files if canaries.CANARY.encode() in (content := p.read_bytes())}


def test_a_sweep_on_red_data(shell):
    """One run that works, one whose metric raises with a row's text; submitted by an agent, then evaluated post hoc."""
    canaries.write_data(shell.cwd / "data")
    (shell.cwd / "data" / "TIER").write_text("red")
    (shell.cwd / "metrics.py").write_text(canaries.METRICS)
    (shell.cwd / "tasks.py").write_text(canaries.TASKS)
    own = [
        "dataset=files",
        "dataset.path=data/rows.json",
        "eval.tasks=[tasks.py@echoes]",
        "num_warmup_steps=0",
        "batch_size=4",
    ]
    # The third call is in the second update: the check, and what was submitted, knew nothing of it.
    scorers = canaries.METRICS.replace(
        "os.kill(os.getpid(), signal.SIGINT)", "raises(logits, labels, tokenizer, ignore_index)"
    )
    (shell.cwd / "metrics.py").write_text(scorers)
    sweep = ["-m", "slurm=cluster", *TINY, *own, "custom_metrics=[metrics.loud],[metrics.stops]", "hydra.sweep.dir=out"]
    environment = {"CLAUDECODE": "1", "PYTHONPATH": str(shell.cwd)}
    no = shell.run("train", *sweep, "eval.keep_samples=true", **environment)
    assert no.returncode == 2 and "CLAUDECODE" in no.stderr and not (shell.cwd / "out").exists()
    done = shell.run("train", *sweep, **environment)
    assert done.returncode == 0, done.stderr
    out = shell.cwd / "out"
    views = shell.wait_all(out, "done", "failed")
    assert sorted(v["state"] for v in views.values()) == ["done", "failed"], views
    good, bad = (next(out / name for name, v in views.items() if v["state"] == state) for state in ("done", "failed"))
    assert (read_result(good / "result.json").tier, read_result(bad / "result.json").redacted) == ("red", True)
    assert "custom_metrics: metrics.stops raised ValueError: (withheld: red data)" in views[bad.name]["reason"]
    again = shell.run("evaluate", out, "eval.tasks=[tasks.py@breaks_when_run]", "eval.baseline=false", **environment)
    assert again.returncode == 0, again.stderr
    shell.wait_all(out, "failed")
    logs = [p for p in (out / ".submitit").iterdir() if p.name.endswith(".out")]
    assert len(logs) >= 3 and any(b"(withheld: red data)" in p.read_bytes() for p in logs)
    assert contents(out) == {}
    assert {p for p in (out, *out.rglob("*")) if stat.S_IMODE(os.lstat(p).st_mode) & 0o077} == set()


def test_permission_is_settled_at_submission(shell):
    """The job's own environment may look like an agent's; what counts is who submitted."""
    canaries.write_data(shell.cwd / "data")
    (shell.cwd / "data" / "TIER").write_text("yellow")
    own = ["dataset=files", "dataset.path=data/rows.json", "eval=none", "num_warmup_steps=0", "lr=1e-3,1e-4"]
    agents = "slurm.setup=['export CODEX_SANDBOX=seatbelt']"
    sweep = ["-m", "slurm=cluster", *TINY, *own, agents, "hydra.sweep.dir=out"]
    no = shell.run("train", *sweep, GEMINI_CLI="1")
    assert no.returncode == 2 and "dataset.permission=" in no.stderr
    done = shell.run("train", *sweep)
    assert done.returncode == 0, done.stderr
    views = shell.wait_all(shell.cwd / "out", "done", "failed")
    assert {v["state"] for v in views.values()} == {"done"}, views
