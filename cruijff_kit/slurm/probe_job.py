"""A tiny job that probes its node: does it see the folder, our Python, the cache and the GPUs?"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.slurm import client, probe
from cruijff_kit.util.cache import cache_dir
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.progress import progress

_NO_FOLDER, _NO_PYTHON = 71, 72  # exit codes of the probe job
_SECONDS_TO_APPEAR = 20  # a network's file system may show late what a node wrote


@dataclass
class NodeReport:
    """Result of the probe job on its node."""

    job_id: str | None = None
    error: str | None = None
    """Why the job did not run, or could not import our package."""
    hostname: str | None = None
    python: str | None = None
    package: str | None = None
    cache_shared: bool = False
    torch_gpus: int | None = None
    """Number of GPUs that torch can use; None: not counted."""

    @property
    def same_package(self) -> bool:
        """Whether the node imports the package that runs here."""
        return self.package == str(Path(__file__).parents[1])


def run_probe_job(folder: Path, options: list[str], gpus: int, wait: int) -> NodeReport:
    """Submit the job, wait for it, and remove what it wrote.

    Args:
        folder: where runs will be written; the job writes into a folder of its own inside.
        options: more options of sbatch.
        gpus: number of GPUs to request.
        wait: seconds after which it is cancelled.
    """
    report, name = NodeReport(), f".doctor-{secrets.token_hex(4)}"
    folder, mark = folder.absolute() / name, cache_dir() / name
    try:
        folder.mkdir()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        (folder / "node.py").write_text(Path(probe.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        arguments = {
            "answer": str(folder / "node.json"),
            "mark": str(mark),
            "start": os.getcwd(),
            "with_gpus": bool(gpus),
        }
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        _submit(folder, options, gpus, report)
        ended = _await_end(wait, report)
        if ended:
            _read_answer(folder, ended, report)
    except ClusterError as error:
        report.error = str(error)
    except OSError as error:
        report.error = f"the probe job could not be prepared: {error}"
    finally:
        with contextlib.suppress(ClusterError):  # an end that came before is no error
            client.cancel([report.job_id] if report.job_id else [])
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            mark.unlink()
    return report


def _submit(folder: Path, options: list[str], gpus: int, report: NodeReport) -> None:
    flags = ["--time=5", "--output=/dev/null", "--chdir=/", "--job-name=doctor", "--nodes=1", "--ntasks=1", *options]
    if gpus:
        flags += [f"--gpus-per-node={gpus}", "--mem=4G"]  # torch takes some
    try:
        printed = client.call("sbatch", "--parsable", *flags, stdin=_script(folder), seconds=60)
    except ClusterError as error:
        raise ClusterError(f"the probe job was refused: {error}") from None
    report.job_id = printed.strip().partition(";")[0]


def _script(folder: Path) -> str:
    python = shlex.quote(sys.executable)
    return f"""#!/bin/sh
cd {shlex.quote(str(folder))} || exit {_NO_FOLDER}
exec >output 2>&1
[ -x {python} ] || exit {_NO_PYTHON}
srun --ntasks=1 {python} node.py arguments.json
"""


def _await_end(wait: int, report: NodeReport) -> client.JobInfo | None:
    """Wait for the end of the job and return its last state; None if it has not ended in time."""
    end = time.monotonic() + wait
    with progress(f"probe job {report.job_id}", wait) as bar:
        while True:
            info = client.job_infos([report.job_id]).get(report.job_id)
            if info is None or info.ended:
                return info or client.JobInfo(report.job_id, "gone")
            state = f"{info.state} ({info.reason})" if info.reason else info.state
            if time.monotonic() >= end:
                break
            bar.advance(state)
            time.sleep(1)
    report.error = f"after {wait} s the probe job was still {state}; cancelled. Wait longer: --wait {wait * 6}"
    return None


def _read_answer(folder: Path, ended: client.JobInfo, report: NodeReport) -> None:
    report.hostname = ended.node
    answer, end = folder / "node.json", time.monotonic() + (0 if ended.exit_code else _SECONDS_TO_APPEAR)
    while answer.name not in os.listdir(folder) and time.monotonic() < end:
        time.sleep(0.5)
    if answer.exists():
        vars(report).update(json.loads(answer.read_text()))
    elif ended.exit_code == _NO_FOLDER:
        report.error = f"{ended.node} does not see {folder.parent}; write runs where all nodes see them"
    elif ended.exit_code == _NO_PYTHON:
        report.error = f"{ended.node} does not see {sys.executable}; put the environment where all nodes see it"
    else:
        output = folder / "output"
        lines = output.read_text(errors="replace").strip().splitlines() if output.exists() else []
        report.error = ": ".join([f"the probe job ended as {ended.state}, exit code {ended.exit_code}", *lines[-1:]])
