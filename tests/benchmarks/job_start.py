"""Where the time goes between sbatch's answer and the first training step of a submitted run, on a cluster that is idle.

    python tests/benchmarks/job_start.py --repeat 3              one to two minutes

A tiny run (tests/tiny) is submitted to a private SLURM on this machine (tests/helpers/cluster.py); then the same run is
made here by the same command with slurm=local. They take turns. Nothing is asserted.

The times are those of files: sweep.json is written when sbatch has answered, status.json when the run begins, when its
checks are over and when training begins, metrics.jsonl after the first step, which is the only one. The job's shell and
interpreter write theirs through slurm.setup.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from submitting import TINY, Cluster, environment, process, queue, say

# One step and one line of metrics; validation would write another one.
RUN = (*TINY, "max_steps_per_epoch=1", "num_warmup_steps=0", "dataset.validation_split=null")
SECONDS_BETWEEN_LOOKS = 0.005
IMPORTS = "imports: torch, torchtune, inspect-ai, ..."
PHASES = (  # what lies between a moment and the one before it
    ("queue: sbatch has answered -> batch script", "script"),
    ("srun: batch script -> interpreter", "interpreter"),
    ("interpreter -> run begins (status.json)", "running"),
    ("checks: data, tokens, prompts", "checked"),
    ("setup: model, tokens, optimizer", "training"),
    ("first step", "stepped"),
)
# sitecustomize.py of the job's interpreter: when it started, and each import that is not within another one.
PROBE = """
import atexit, builtins, json, os, threading, time
started, spent, local, original = time.time(), [], threading.local(), builtins.__import__

def timed(*args, **kwargs):
    if getattr(local, "inside", False):
        return original(*args, **kwargs)
    local.inside, begun = True, time.perf_counter()
    try:
        return original(*args, **kwargs)
    finally:
        local.inside, seconds = False, time.perf_counter() - begun
        if seconds > 0.0005:
            spent.append((time.time(), seconds))

def write():
    with open(os.environ["JOB_START_PROBE"], "w") as file:
        json.dump({"started": started, "imports": spent}, file)

if "JOB_START_PROBE" in os.environ:
    builtins.__import__ = timed
    atexit.register(write)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="pairs that are timed, after one that is not (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster(accounting=False) as cluster:
        report = measure(cluster, Path(folder), args.repeat)
    print(json.dumps(report, indent=2)) if args.json else show(report)


def measure(cluster: Cluster, folder: Path, repeat: int) -> dict[str, Any]:
    """The run on the cluster and the run here, in turns."""
    (folder / "probe").mkdir()
    (folder / "probe" / "sitecustomize.py").write_text(PROBE, encoding="utf-8")
    pairs = []
    for number in range(repeat + 1):  # the first pair makes the data and fills the disk's cache
        say(f"pair {number} of {repeat}" if number else "a pair that does not count")
        load = os.getloadavg()[0]
        submitted, here = on_cluster(cluster, folder, f"job{number}"), run_here(cluster, folder, f"here{number}")
        pair = {"job": submitted, "here": here, "load_average": load}
        pairs.append({**pair, "ratio": sum(submitted["phases"].values()) / here})
    return {"pairs": pairs[1:], "cpus": len(os.sched_getaffinity(0))}


def on_cluster(cluster: Cluster, folder: Path, name: str) -> dict[str, Any]:
    """Submit the run, look at what it writes, and wait until nothing of it is left.

    Returns:
        phases: seconds by name, from sbatch's answer to the first step. command: seconds from the start of the command to
        sbatch's answer. result: what result.json says about its phases.
    """
    run, script, probe = folder / name, folder / f"{name}.script", folder / f"{name}.probe"
    setup = [
        f"date +%s.%N > {shlex.quote(str(script))}",
        f"export JOB_START_PROBE={shlex.quote(str(probe))}",
        f"export PYTHONPATH={shlex.quote(str(folder / 'probe'))}:$PYTHONPATH",
    ]
    overrides = ["slurm=cluster", *RUN, f"slurm.setup={json.dumps(setup)}", f"hydra.run.dir={run}"]
    started = time.time()
    command = subprocess.Popen(
        [sys.executable, "-m", "cruijff_kit.train", *overrides],
        cwd=folder,
        env=environment(cluster, folder),
        stdout=subprocess.DEVNULL,
    )
    moments = follow(run, command)
    command.wait()
    while queue(cluster) or not probe.exists():
        time.sleep(0.1)
    moments["answered"] = (run / "sweep.json").stat().st_mtime
    moments["script"] = float(script.read_text(encoding="utf-8"))
    noted = json.loads(probe.read_text(encoding="utf-8"))
    moments["interpreter"], moments["stepped"] = noted["started"], (run / "metrics.jsonl").stat().st_mtime
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "phases": phases(moments, noted["imports"]),
        "command": moments["answered"] - started,
        "result": result["seconds"],
    }


def follow(run: Path, command: subprocess.Popen) -> dict[str, float]:
    """Wait for a run's result; returns the moments at which status.json first said that it runs, is checked, and trains.

    Raises:
        SystemExit: the command failed, or the run did.
    """
    signs = {
        "running": lambda status: status["state"] == "running",
        "checked": lambda status: status["total_steps"] is not None,
        "training": lambda status: status["training_since"] is not None,
    }
    moments: dict[str, float] = {}
    status, seen = {"state": "queued"}, 0
    while not (run / "result.json").exists():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if command.poll() or status["state"] in ("failed", "interrupted"):
            raise SystemExit(f"{run} {status['state']}: {status.get('reason')}")
        try:
            with (run / "status.json").open(encoding="utf-8") as file:
                written = os.fstat(file.fileno()).st_mtime_ns
                if written == seen:
                    continue
                seen, status = written, json.load(file)
        except FileNotFoundError:
            continue
        for name, sign in signs.items():
            if name not in moments and sign(status):
                moments[name] = written / 1e9
    return moments


def phases(moments: dict[str, float], imports: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds by phase; imports that a run makes on its way are a phase of their own.

    Args:
        moments: when what happened.
        imports: the end and the seconds of each.
    """
    seconds, before = {IMPORTS: 0.0}, moments["answered"]
    for name, moment in PHASES:
        within = sum(spent for end, spent in imports if before < end <= moments[moment])
        within = 0.0 if moment == "running" else within
        seconds[name] = moments[moment] - before - within
        seconds[IMPORTS] += within
        before = moments[moment]
    return seconds


def run_here(cluster: Cluster, folder: Path, name: str) -> float:
    """The run with slurm=local: seconds from the start of the process to the first step."""
    command = [sys.executable, "-m", "cruijff_kit.train", "slurm=local", *RUN, f"hydra.run.dir={folder / name}"]
    started = time.time()
    process(command, folder, environment(cluster, folder))
    return (folder / name / "metrics.jsonl").stat().st_mtime - started


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    pairs = report["pairs"]
    table = Table(title="from sbatch's answer to the first training step, seconds", title_justify="left")
    for column in ("phase", "median", "fastest", "slowest"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    names = [name for name, _ in PHASES]
    for name in [*names[:3], IMPORTS, *names[3:]]:
        table.add_row(name, *three([pair["job"]["phases"][name] for pair in pairs]))
    table.add_section()
    table.add_row("all", *three([sum(pair["job"]["phases"].values()) for pair in pairs]))
    table.add_row("slurm=local, from the start of the process", *three([pair["here"] for pair in pairs]))
    table.add_row("before: the command that submits", *three([pair["job"]["command"] for pair in pairs]))
    console = Console(highlight=False)
    console.print(table)
    ratio, loads = statistics.median(pair["ratio"] for pair in pairs), [pair["load_average"] for pair in pairs]
    console.print(f"submitted / local: {ratio:.2f}, median of {len(pairs)} pairs; {report['cpus']} CPUs, ", end="")
    console.print(f"load average {min(loads):.1f} to {max(loads):.1f}")


def three(values: list[float]) -> list[str]:
    """Median, fastest, slowest."""
    return [f"{f(values):.3f}" for f in (statistics.median, min, max)]


if __name__ == "__main__":
    main()
