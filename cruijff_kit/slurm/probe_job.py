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
    """What the probe job saw.

    error: why it saw nothing, or not our package. torch_gpus: how many torch reaches; None: not asked for.
    """

    job_id: str | None = None
    error: str | None = None
    hostname: str | None = None
    python: str | None = None
    package: str | None = None
    cache_shared: bool = False
    torch_gpus: int | None = None

    @property
    def same_package(self) -> bool:
        """Whether the node imports the package that runs here."""
        return self.package == str(Path(__file__).parents[1])


def run_probe_job(folder: Path, options: list[str], gpus: int, wait: int) -> NodeReport:
    """Submit the job, wait for it, and take away what it wrote.

    Args:
        folder: where runs will be written; the job writes into a folder of its own inside.
        options: more options of sbatch.
        gpus: how many it asks for.
        wait: the most seconds until it has ended; then it is cancelled.
    """
    test, name = NodeReport(), f".doctor-{secrets.token_hex(4)}"
    place, mark = folder.absolute() / name, cache_dir() / name
    try:
        place.mkdir()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        (place / "node.py").write_text(Path(probe.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        asked = {"answer": str(place / "node.json"), "mark": str(mark), "start": os.getcwd(), "with_gpus": bool(gpus)}
        (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        _submit(place, options, gpus, test)
        ended = _await_end(wait, test)
        if ended:
            _read_answer(place, ended, test)
    except ClusterError as error:
        test.error = str(error)
    except OSError as error:
        test.error = f"the test job could not be prepared: {error}"
    finally:
        with contextlib.suppress(ClusterError):  # an end that came before is no error
            client.cancel([test.job_id] if test.job_id else [])
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            mark.unlink()
    return test


def _submit(place: Path, options: list[str], gpus: int, test: NodeReport) -> None:
    asked = ["--time=5", "--output=/dev/null", "--chdir=/", "--job-name=doctor", "--nodes=1", "--ntasks=1", *options]
    if gpus:
        asked += [f"--gpus-per-node={gpus}", "--mem=4G"]  # torch takes some
    try:
        said = client.call("sbatch", "--parsable", *asked, stdin=_script(place), seconds=60)
    except ClusterError as error:
        raise ClusterError(f"the test job was refused: {error}") from None
    test.job_id = said.strip().partition(";")[0]


def _script(place: Path) -> str:
    python = shlex.quote(sys.executable)
    return f"""#!/bin/sh
cd {shlex.quote(str(place))} || exit {_NO_FOLDER}
exec >output 2>&1
[ -x {python} ] || exit {_NO_PYTHON}
srun --ntasks=1 {python} node.py asked.json
"""


def _await_end(wait: int, test: NodeReport) -> client.JobInfo | None:
    """How the job ended; None when it has not."""
    end = time.monotonic() + wait
    with progress(f"test job {test.job_id}", wait) as bar:
        while True:
            info = client.job_infos([test.job_id]).get(test.job_id)
            if info is None or info.ended:
                return info or client.JobInfo(test.job_id, "gone")
            said = f"{info.state} ({info.reason})" if info.reason else info.state
            if time.monotonic() >= end:
                break
            bar.advance(said)
            time.sleep(1)
    test.error = f"after {wait} s the test job was still {said}; cancelled. Wait longer: --wait {wait * 6}"
    return None


def _read_answer(place: Path, ended: client.JobInfo, test: NodeReport) -> None:
    test.hostname = ended.node
    answer, end = place / "node.json", time.monotonic() + (0 if ended.exit_code else _SECONDS_TO_APPEAR)
    while answer.name not in os.listdir(place) and time.monotonic() < end:
        time.sleep(0.5)
    if answer.exists():
        vars(test).update(json.loads(answer.read_text()))
    elif ended.exit_code == _NO_FOLDER:
        test.error = f"{ended.node} does not see {place.parent}; write runs where all nodes see them"
    elif ended.exit_code == _NO_PYTHON:
        test.error = f"{ended.node} does not see {sys.executable}; put the environment where all nodes see it"
    else:
        output = place / "output"
        said = output.read_text(errors="replace").strip().splitlines() if output.exists() else []
        test.error = ": ".join([f"the test job ended as {ended.state}, exit code {ended.exit_code}", *said[-1:]])
