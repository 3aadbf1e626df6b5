"""Our commands on a machine that is part of a SLURM cluster, and runs for them to submit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cluster import Cluster
from forked import forked

from cruijff_kit.slurm.run_states import collect_states, find_runs

TINY_LLAMA = Path(__file__).parents[1] / "tiny" / "llama"

# Trains in a second.
TINY = ("model=hf_llama", f"model.path={TINY_LLAMA}", "device=cpu", "dtype=fp32",
        "dataset.max_samples=16", "num_warmup_steps=1", "eval.limit=4", "eval.baseline=false", "epochs_to_save=last",
        "slurm.mem=2G", "slurm.cpus=1")  # fmt: skip
# A tenth of a second for each step, in which the processors are free: what is to be caught in the middle.
SLOW = "torchtune.loss._component_=slow_loss.SlowCrossEntropy"
FAST = {"SLOW_LOSS_SECONDS": "0"}  # in the environment: the same numbers without the wait
LONG = ("eval=none", SLOW, *TINY, "dataset.max_samples=200", "batch_size=2", "epochs=30")


class Shell:
    """Our commands, given in a folder of a machine that is part of a cluster."""

    def __init__(self, cluster: Cluster, cwd: Path, environment: dict[str, str]) -> None:
        self.cluster, self.cwd = cluster, cwd
        self.environment = {k: v for k, v in environment.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= cluster.environment
        # Where jobs find slow_loss.py.
        paths = [str(Path(__file__).parent), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.patience = 2
        self._hurried: set[tuple[str, int]] = set()

    def run(self, module: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`python -m cruijff_kit.MODULE ARGUMENTS`, in a fork of this process, which has done the slow imports."""
        return forked(module, [str(a) for a in arguments], self.cwd, self.environment | more)

    def start(
        self, module: str, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """As run, without waiting."""
        command = [sys.executable, "-m", f"cruijff_kit.{module}", *map(str, arguments)]
        pipes = {"stdin": stdin, "stdout": stdout, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.cwd, env=self.environment, text=True, **pipes)

    def submit(self, folder: str, *overrides: str) -> Path:
        """Submit a sweep into a folder and see that it was."""
        done = self.run("train", "-m", "slurm=cluster", *overrides, f"hydra.sweep.dir={folder}")
        assert done.returncode == 0, done.stderr
        assert "submitted to SLURM" in done.stdout
        return self.cwd / folder

    def views(self, folder: Path) -> dict[str, dict]:
        """What `status --json` says, by run."""
        done = self.run("status", folder, "--json")
        assert done.returncode == 0, done.stderr
        return {v["name"]: v for v in json.loads(done.stdout)}

    def wait(self, folder: Path, condition: Callable[[dict[str, dict]], bool], seconds: float = 90) -> dict[str, dict]:
        """Look at the states, in this process, until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition(views := self._look(folder)):
            assert time.monotonic() < deadline, views
            for view in views.values():
                waits = view["state"] == "queued" and "BeginTime" in (view["reason"] or "")
                if waits and (view["job_id"], view["restarts"]) not in self._hurried:
                    self._hurried.add((view["job_id"], view["restarts"]))
                    self.start_soon(view["job_id"])
            time.sleep(0.5)  # the jobs need the processors
        return views

    def _look(self, folder: Path) -> dict[str, dict]:
        """What `status --json` would say, by run. A fifth of the command's time, which the jobs need."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            infos, _ = collect_states(find_runs(folder))
        return {info.name: json.loads(json.dumps(asdict(info))) for info in infos}

    def wait_all(self, folder: Path, *states: str, seconds: float = 90) -> dict[str, dict]:
        """Wait until every run is in one of some states."""
        return self.wait(folder, lambda views: all(v["state"] in states for v in views.values()), seconds)

    def wait_for_file(self, path: Path, seconds: float = 60) -> None:
        """Wait until a file is there."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, path
            time.sleep(0.1)

    def start_soon(self, job_id: str) -> None:
        """Shorten the wait that SLURM puts between two starts of a job; a node that still ends the first refuses it."""
        self.cluster.run("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{self.patience}", check=False)

    def slurm_state(self, job_id: str) -> str:
        """SLURM's word for a job."""
        line = self.cluster.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)["JobState"]

    def python_of(self, run: Path) -> int:
        """Process of a run that is under way."""
        return json.loads((run / "status.json").read_text())["pid"]
