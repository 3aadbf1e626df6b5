"""From the shell into the queue: what is asked for, what is refused, what is recognised, what stays as it was."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_shell import LONG, TINY, Shell

from cruijff_kit.records.result import read_result
from cruijff_kit.records.sweep_manifest import read_sweep_manifest

HOLD = "slurm.additional_parameters.hold=true"


def queue(shell: Shell) -> list[str]:
    """Jobs that are queued or running, arrays as one line each."""
    return shell.cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


def job(shell: Shell, job_id: str) -> dict[str, str]:
    """What SLURM holds about a job."""
    line = shell.cluster.run("scontrol", "--oneliner", "show", "job", job_id).stdout.splitlines()[0]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def test_the_one_line(shell):
    """Returns with the runs in the queue; they end done, with a table, and every job has its log."""
    done = shell.run("train", "-m", "slurm=cluster", "lora.rank=4,8", "lr=1e-3,5e-4", *TINY)
    assert done.returncode == 0, done.stderr
    folder = next((shell.cwd / "multirun" / "capitalization").iterdir())
    assert re.search(r"^4 runs submitted to SLURM:\n  job \d+: 4 runs; 1 CPU, 2G, 01:00:00$", done.stdout, re.MULTILINE)
    assert f"cruijff-kit status multirun/capitalization/{folder.name} --watch" in done.stdout
    assert not list(folder.glob("*/result.json"))
    views = shell.wait_all(folder, "done")
    assert set(views) == {f"rank={r},lr={lr}" for r in (4, 8) for lr in ("0.001", "0.0005")}
    assert all(v["step"] == v["total_steps"] == 2 and Path(v["log"]).read_text() for v in views.values())
    table = shell.run("table", folder)
    assert table.returncode == 0 and all(name in table.stdout for name in views)
    manifest = read_sweep_manifest(folder)
    assert [len(e.submissions) for e in manifest.runs] == [1] * 4 and manifest.git_commit and manifest.code
    logs = shell.run("logs", folder, "rank=4,lr=0.001")
    assert "done: validation_loss" in logs.stdout and logs.returncode == 0
    several = shell.run("logs", folder)
    assert several.returncode == 2 and "has 4 runs; name one: rank=4,lr=0.001" in several.stderr
    unknown = shell.run("logs", folder, "rank=5,lr=0.001")
    assert "no run is called rank=5,lr=0.001; did you mean rank=" in unknown.stderr


def test_a_single_run(shell):
    done = shell.run("train", "slurm=cluster", *TINY, "hydra.run.dir=alone", "slurm.wait=true")
    assert done.returncode == 0, done.stderr
    assert "1 run submitted to SLURM" in done.stdout and "1 done" in done.stderr
    assert read_result(shell.cwd / "alone" / "result.json").status == "done"
    (name,) = shell.views(shell.cwd / "alone")
    assert re.fullmatch("[a-z]+_[a-z]+", name)
    again = shell.run("train", "slurm=cluster", *TINY, "hydra.run.dir=alone")
    assert again.returncode == 0 and "1 of 1 runs exist already (1 done)" in again.stderr
    assert "submitted" not in again.stdout


def test_resources_belong_to_the_run(shell, tiny):
    """One array per distinct request, each run with its model's; slurm.max_parallel holds over all of them."""
    conf = shell.cwd / "conf" / "model"
    conf.mkdir(parents=True)
    for name, resources in {
        "small": "{cpus: 1, mem: 1G, time: '00:10:00'}",
        "big": "{cpus: 3, mem: 3G, gpus: 1}",
    }.items():
        text = f"defaults: [hf_llama, _self_]\nname: {name}\npath: {tiny}\nresources: {resources}\n"
        (conf / f"{name}.yaml").write_text(text)
    plain = [a for a in TINY if not a.startswith(("model", "slurm"))]
    options = ["--config-dir", "conf", "slurm.partition=gpu", HOLD, "slurm.max_parallel=3", "hydra.sweep.dir=out"]
    done = shell.run("train", "-m", "slurm=cluster", "model=small,big", "seed=1,2,3", *plain, *options)
    assert done.returncode == 0, done.stderr
    assert "3 runs, 2 at once; 1 CPU, 1G, 00:10:00, partition gpu" in done.stdout
    assert "3 runs, 1 at once; 3 CPUs, 1 GPU, 3G, 01:00:00, partition gpu" in done.stdout
    views = shell.views(shell.cwd / "out")
    small, big = job(shell, views["model=small,seed=1"]["job_id"]), job(shell, views["model=big,seed=1"]["job_id"])
    assert (small["MinCPUsNode"], small["MinMemoryNode"], small["TimeLimit"]) == ("1", "1G", "00:10:00")
    assert (big["MinCPUsNode"], big["MinMemoryNode"], big["TresPerNode"]) == ("3", "3G", "gres:gpu:1")
    assert small["ArrayTaskThrottle"] == "2" and big["ArrayTaskThrottle"] == "1"
    one = [*options[:-2], "slurm.max_parallel=1", "force=true", "hydra.sweep.dir=one"]
    done = shell.run("train", "-m", "slurm=cluster", "model=small,big", "seed=1,2", *plain, *one)
    assert done.returncode == 0, done.stderr
    views = shell.views(shell.cwd / "one")
    first = views["model=small,seed=1"]["job_id"].partition("_")[0]
    assert job(shell, views["model=big,seed=2"]["job_id"])["Dependency"].startswith(f"afterany:{first}")


def test_what_is_typed_arrives(shell):
    """Lists, commas, quotes, and options that only sbatch knows."""
    done = shell.run(
        "train", "slurm=cluster", *TINY, "hydra.run.dir=\"a run, it's odd\"", "slurm.exclude=[c1,c2]",
        "slurm.account=other", "slurm.mail_type=[END,FAIL]", "slurm.mail_user=me@example.org",
        'slurm.comment="it\'s a \\"test\\", ok"',
        'slurm.setup=["export GREETING=\\"good day, you\\"","echo $GREETING"]', "slurm.teardown=[echo bye]",
        "slurm.srun_args=[--label]", "slurm.additional_parameters.nice=7", "slurm.job_name=mine", "slurm.time=00:20:00",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = shell.cwd / "a run, it's odd"
    (view,) = shell.wait_all(folder, "done").values()
    shown = shell.cluster.run("scontrol", "show", "job", view["job_id"]).stdout
    assert '  Comment=it\'s a "test", ok' in shown and "Account=other" in shown and "JobName=mine" in shown
    assert "ExcNodeList=c[1-2]" in shown and "MailUser=me@example.org" in shown and "TimeLimit=00:20:00" in shown
    assert "Nice=7" in shown
    while queue(shell):
        time.sleep(0.2)
    log = Path(view["log"]).read_text()
    assert "good day, you\n" in log and "0: done: validation_loss" in log and log.endswith("\nbye\n")


def test_dry_run_shows_and_submits_nothing(shell):
    line = ["train", "-m", "slurm=cluster", "seed=1,2", "slurm.cpus=1,2", *TINY[:-1], "dry_run=true"]
    done = shell.run(*line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --array=0-1%2") == 2 and "# array 2 of 2: 2 runs; 2 CPUs, 2G" in done.stdout
    assert done.stdout.count("# sbatch --test-only: Job ") == 2 and "to start at" in done.stdout
    assert not queue(shell) and not (shell.cwd / "multirun").exists()
    refused = shell.run(*line, "slurm.partition=nowhere")
    assert refused.returncode == 3 and "# sbatch --test-only: refused: sbatch: invalid partition" in refused.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("slurm.account=nobody", "Invalid account or account/partition combination specified; override slurm.account"),
        ("slurm.partition=nowhere", "invalid partition specified: nowhere"),
        ("slurm.partition=nowhere", "(there are: cpu, gpu, preempt)"),
        ("slurm.qos=gold", "Invalid qos specification; override slurm.qos"),
        ("slurm.mem=900G", "override slurm.mem"),
        ("slurm.gpus=4 num_warmup_steps=0", "override slurm.mem, slurm.cpus, slurm.gpus"),
        ("slurm.constraint=h100", "override slurm.constraint"),
        ("slurm.dependency=afterok", "override slurm.dependency"),
        ("slurm.time=9-00:00:00", "slurm.time=9-00:00:00 exceeds the partition's limit (cpu 1-00:00:00)"),
        ("slurm.nodelist=c99", "override slurm.nodelist"),
        ("slurm.additional_parameters.no_such_option=1", "unrecognized option '--no-such-option=1'"),
    ],
)
def test_refusals_are_one_line(shell, override, words):
    done = shell.run("train", "slurm=cluster", *TINY, *override.split())
    assert done.returncode == 3 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line and line.endswith("; nothing was submitted")
    assert "Traceback" not in done.stderr
    assert not queue(shell) and not [p for p in shell.cwd.rglob("*") if p.is_file()]


def test_options_of_ours_are_not_free(shell):
    done = shell.run("train", "slurm=cluster", *TINY, "slurm.additional_parameters.output=here")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: slurm.additional_parameters.output is reserved; instead: logs are in .submitit; "
        "cruijff-kit logs shows them"
    )


def test_one_bad_request_stops_all_before_the_queue(shell):
    done = shell.run("train", "-m", "slurm=cluster", *TINY, "slurm.partition=cpu,nowhere")
    assert done.returncode == 3 and "invalid partition" in done.stderr
    assert not queue(shell) and not (shell.cwd / "multirun").exists()


def test_the_queue_is_full(shell):
    """What fits is queued; the user is told; resume queues the rest when there is room."""
    done = shell.run("train", "-m", "slurm=cluster", *TINY, "seed=range(1,6)", "slurm.qos=few", "hydra.sweep.dir=out")
    assert done.returncode == 3 and "3 runs submitted to SLURM" in done.stdout
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: 2 runs do not fit into the queue now (sbatch: QOSMaxSubmitJobPerUserLimit; ")
    assert line.endswith("submit the rest later: cruijff-kit resume out")
    folder = shell.cwd / "out"
    views = shell.wait(folder, lambda v: sum(x["state"] == "done" for x in v.values()) == 3)
    waiting = [v for v in views.values() if v["state"] == "interrupted"]
    assert len(waiting) == 2 and all("not submitted" in v["reason"] for v in waiting)
    while queue(shell):
        time.sleep(0.2)
    resumed = shell.run("resume", folder)
    assert resumed.returncode == 0 and "2 runs submitted" in resumed.stdout, resumed.stderr
    shell.wait_all(folder, "done")


def test_arrays_above_the_limit_are_split(tmp_path, environment, slurm_packages):
    with Cluster(accounting=False, max_array_size=3) as cluster:
        shell = Shell(cluster, tmp_path, environment)
        folder = shell.submit("out", *TINY, "seed=range(1,9)", HOLD)
        sizes = [len(e.submissions) for e in read_sweep_manifest(folder).runs]
        arrays = [e.submissions[0].job_id.partition("_")[0] for e in read_sweep_manifest(folder).runs]
        assert sizes == [1] * 8 and [arrays.count(a) for a in dict.fromkeys(arrays)] == [3, 3, 2]


def test_identical_runs_are_recognised(shell):
    """A larger sweep runs only what is new; what is on its way counts; force runs all; other data is another run."""
    sweep = ["train", "-m", "slurm=cluster", *TINY]
    first = shell.run(*sweep, "seed=1,2", HOLD)
    assert first.returncode == 0, first.stderr
    experiment = shell.cwd / "multirun" / "capitalization"
    (one,) = experiment.iterdir()
    while_queued = shell.run(*sweep, "seed=1,2,3")
    assert "2 of 3 runs exist already (2 queued or running)" in while_queued.stderr
    assert "1 run submitted" in while_queued.stdout
    for view in shell.views(one).values():
        shell.cluster.run("scontrol", "release", view["job_id"])
    shell.wait_all(experiment, "done")
    (two,) = set(experiment.iterdir()) - {one}
    assert {p.name for p in two.iterdir() if p.is_dir()} == {".submitit", "seed=3"}
    table = shell.run("table", two, "--json")
    assert sorted(r["seeds"]["seed"] for r in json.loads(table.stdout)["runs"]) == [1, 2, 3]
    same = shell.run(*sweep, "seed=3,2,1")
    assert same.returncode == 0 and "3 of 3 runs exist already (3 done) in 2 sweeps; force=true" in same.stderr
    assert "seed=1" in same.stdout and "submitted" not in same.stdout
    forced = shell.run(*sweep, "seed=1", "force=true", HOLD)
    assert "1 run submitted" in forced.stdout
    other = shell.run(*sweep, "seed=1", "dataset.arguments.seed=5", HOLD)
    assert "1 run submitted" in other.stdout and "exist already" not in other.stderr


def test_queued_runs_do_not_change(shell):
    """Neither an edit of a YAML nor of the shell's folder reaches a run that is queued."""
    conf = shell.cwd / "conf" / "lora"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("defaults: [default, _self_]\nrank: 4\n")
    folder = shell.submit("out", *TINY, "--config-dir", "conf", "lora=mine", "seed=1", HOLD)
    (conf / "mine.yaml").write_text("defaults: [default, _self_]\nrank: 8\n")
    (view,) = shell.views(folder).values()
    assert view["state"] == "queued" and "JobHeldUser" in view["reason"]
    shell.cluster.run("scontrol", "release", view["job_id"])
    shell.wait_all(folder, "done")
    (path,) = folder.glob("*/result.json")
    assert read_result(path).settings["lora.rank"] == 4


def test_changed_code_is_noticed(shell):
    code = shell.cwd / "code"
    root = Path(__file__).parents[2]
    shutil.copytree(root / "cruijff_kit", code / "cruijff_kit", ignore=shutil.ignore_patterns("__pycache__"))
    shell.environment["PYTHONPATH"] = str(code)
    folder = shell.submit("out", *TINY, "seed=1", HOLD)
    with (code / "cruijff_kit" / "util" / "progress.py").open("a") as file:
        file.write("\n# changed\n")
    (view,) = shell.views(folder).values()
    shell.cluster.run("scontrol", "release", view["job_id"])
    (view,) = shell.wait_all(folder, "done").values()
    assert view["notes"] == ["the code of cruijff_kit changed between submission and start"]
    assert "warning: the code of cruijff_kit changed" in Path(view["log"]).read_text()


def test_waiting_gives_a_sweeper_its_objectives(shell):
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "hydra.sweep.dir=out"]
    line = ["train", "-m", "slurm=cluster", *search, "lr=tag(log,interval(1e-4,1e-2))", *TINY, "eval=none"]
    blind = shell.run(*line)
    assert blind.returncode == 2 and "add slurm.wait=true" in blind.stderr and not queue(shell)
    done = shell.run(*line, "slurm.wait=true", "objective=validation_loss")
    assert done.returncode == 0, done.stderr
    objectives = [read_result(p).objective for p in (shell.cwd / "out").glob("*/result.json")]
    assert len(objectives) == 2
    assert f"best_value: {min(objectives)}" in (shell.cwd / "out" / "optimization_results.yaml").read_text()


def test_waiting_for_a_failure_and_ctrl_c(shell):
    """A failed run gives exit code 1; Ctrl-C without a terminal leaves the jobs running."""
    line = ["train", "-m", "slurm=cluster", "slurm.wait=true"]
    failed = shell.run(*line, *TINY, "lr=1e30", "lr_scheduler=constant", "epochs=3", "hydra.sweep.dir=bad")
    assert failed.returncode == 1 and "1 of 1 runs failed" in failed.stderr and "smaller lr" in failed.stdout
    waiting = shell.start(*line, *LONG, "seed=1", "hydra.sweep.dir=out")
    shell.wait_for_file(shell.cwd / "out" / "sweep.json")
    shell.wait(shell.cwd / "out", lambda v: all(x["job_id"] for x in v.values()))
    time.sleep(1)
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 130 and "1 runs continue" in err
    (view,) = shell.views(shell.cwd / "out").values()
    assert view["state"] in ("queued", "running") and queue(shell)


def test_ctrl_c_at_a_terminal_asks(shell):
    master, terminal = pty.openpty()
    line = ["train", "-m", "slurm=cluster", "slurm.wait=true", *TINY, HOLD, "hydra.sweep.dir=out"]
    waiting = shell.start(*line, stdin=terminal, stdout=terminal)
    shell.wait_for_file(shell.cwd / "out" / "sweep.json")
    shell.wait(shell.cwd / "out", lambda v: all(x["job_id"] for x in v.values()))
    time.sleep(1)
    os.write(master, b"y\n")
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    out = os.read(master, 100_000).decode()
    assert waiting.returncode == 130 and "cancel the 1 runs that are queued or running? [y/N]" in out, err
    assert "1 runs cancelled" in err
    (view,) = shell.views(shell.cwd / "out").values()
    assert view["state"] == "cancelled" and not queue(shell)


def test_two_commands_at_once(shell):
    """Two sweeps into one folder: the manifest has every run, each once."""
    lines = [
        ["train", "-m", "slurm=cluster", *TINY, HOLD, f"seed={s}", "hydra.sweep.dir=out"] for s in ("1,2,3", "4,5")
    ]
    both = [shell.start(*line) for line in lines]
    assert [p.wait(timeout=90) for p in both] == [0, 0]
    manifest = read_sweep_manifest(shell.cwd / "out")
    assert sorted(e.name for e in manifest.runs) == [f"seed={i}" for i in range(1, 6)]
    assert all(len(e.submissions) == 1 and e.submissions[0].job_id for e in manifest.runs)


def test_a_launcher_that_dies(shell):
    """Killed while sbatch is answering: the job is known by its script, and runs."""
    real = shutil.which("sbatch")
    slow = shell.cwd / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{real} "$@"\nsleep 30\n')
    slow.chmod(0o755)
    shell.environment["PATH"] = f"{slow.parent}:{os.environ['PATH']}"
    launcher = shell.start("train", "-m", "slurm=cluster", *TINY, "seed=1,2", "hydra.sweep.dir=out")
    deadline = time.monotonic() + 60
    while not queue(shell):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    launcher.kill()
    subprocess.run(["pkill", "-f", str(slow)])
    folder = shell.cwd / "out"
    assert all(a.job_id is None for e in read_sweep_manifest(folder).runs for a in e.submissions)
    views = shell.wait_all(folder, "done")
    assert all(v["job_id"] for v in views.values())


def test_without_slurm(shell, tmp_path):
    """On a machine without sbatch: one line, nothing left."""
    shell.environment["PATH"] = str(tmp_path)
    done = shell.run("train", "-m", "slurm=cluster", *TINY)
    assert done.returncode == 3 and "there is no scontrol on this machine" in done.stderr
    assert not (shell.cwd / "multirun").exists()
