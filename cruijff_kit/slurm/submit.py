"""Submitting runs: one array of SLURM jobs per distinct request, written down before and after sbatch is called.

submitit writes the sbatch script. What its jobs do is ours (sweep/job.py): each reads the run's frozen config from the
run's folder, so that nothing has to be unpickled, and a job may start before sbatch has returned.
"""

import dataclasses
import json
import re
import shlex
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.records.run_status import INTERRUPTED, RunStatus, mark_queued, read_status, write_status
from cruijff_kit.records.sweep_manifest import Submission, edit_sweep_manifest, read_sweep_manifest, resolve_folder
from cruijff_kit.records.versions import code_hash
from cruijff_kit.slurm import client
from cruijff_kit.slurm.request import describe, grouped, shares, split
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import progress

_SECONDS_TO_SUBMIT = 120
_FULL = ("submit limit", "MaxSubmit", "job array specification", "MaxJobCount", "temporarily unable to accept job")
_CURES = {
    "account": "slurm.account",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "time limit": "slurm.time",
    "feature": "slurm.constraint",
    "dependency": "slurm.dependency",
    "gres": "slurm.gpus or slurm.gres",
    "memory": "slurm.mem",
    "node configuration": "slurm.mem, slurm.cpus, slurm.gpus, slurm.partition or slurm.constraint",
    "reservation": "slurm.additional_parameters.reservation",
    "node name": "slurm.nodelist or slurm.exclude",
}


@dataclass
class JobRequest:
    """A run that is to be submitted: its folder, sbatch's options, slurm.max_parallel, why, and what is changed.

    together: runs (this one among them) that are one job: their post-hoc evaluation, or, with a number in `at_once` (0: as
    many as measuring finds best), a pack that trains there.
    """

    folder: Path
    options: dict[str, Any]
    max_parallel: int | None = None
    reason: str = "first"
    changes: dict[str, Any] = field(default_factory=dict)
    together: list[Path] | None = None
    at_once: int | None = None

    @property
    def listed(self) -> Any:
        """The job as its file of runs has it."""
        if self.together is None:
            return str(self.folder)
        folders = [str(f) for f in self.together]
        return folders if self.at_once is None else {"pack": folders, "at_once": self.at_once}

    @property
    def folders(self) -> list[Path]:
        """The folders of all its runs."""
        return self.together or [self.folder]


@dataclass
class Array:
    """Runs that share a job array."""

    options: dict[str, Any]
    runs: list[JobRequest]
    parallel: int | None = None
    after: "Array | None" = None
    job_id: str | None = None

    @property
    def what(self) -> str:
        """In one line."""
        job = f"job {self.job_id}: " if self.job_id else ""
        limit = f", {self.parallel} at once" if self.parallel else ""
        return f"{job}{_runs(self.size)}{self._shared()}{limit}; {describe(self.options)}"

    @property
    def size(self) -> int:
        """How many runs it is of."""
        return sum(len(r.folders) for r in self.runs)

    def _shared(self) -> str:
        jobs = len(self.runs)
        return "" if jobs == self.size else f" in {jobs} job{'s' * (jobs > 1)}"


def _runs(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"


@dataclass
class SubmitResult:
    """What became of a submission: the arrays in the queue, the runs that did not fit, and SLURM's words about those."""

    arrays: list[Array]
    left: list[JobRequest] = field(default_factory=list)
    why: str | None = None


def arrays_of(runs: list[JobRequest]) -> list[Array]:
    """The arrays that runs make, before anything is submitted.

    Raises:
        ClusterError: SLURM does not answer.
    """
    parts = split(grouped([r.options for r in runs]), _largest_array())
    limits = [r.max_parallel for r in runs if r.max_parallel is not None]
    arrays = [Array(options, [runs[i] for i in places]) for options, places in parts]
    for array, (parallel, after) in zip(
        arrays, shares([len(a.runs) for a in arrays], min(limits, default=None)), strict=True
    ):
        array.parallel, array.after = parallel, None if after is None else arrays[after]
    return arrays


def _largest_array() -> int:
    config = client.config()
    per_site = re.search(r"max_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    sizes = [int(config.get("MaxArraySize", 1001)), *([int(per_site[1])] if per_site else [])]
    return max(1, min(sizes))


def test_only(array: Array, sweep_dir: Path, cwd: str) -> str:
    """What `sbatch --test-only` says about an array: when it might start. Nothing is submitted or written.

    Raises:
        ClusterError: it would be refused.
    """
    _check_time(array)
    # Without the array that it waits for, which does not exist yet.
    text = _script(dataclasses.replace(array, after=None), sweep_dir, sweep_dir / ".submitit" / "runs.json")
    try:
        done = client.call_both("sbatch", "--test-only", f"--chdir={cwd}", stdin=text, seconds=_SECONDS_TO_SUBMIT)
    except ClusterError as error:
        raise refused(error) from None
    return client.own_words("sbatch", done)


def _check_time(array: Array) -> None:
    """SLURM takes a job that asks for more time than its partition gives, and never starts it (but for some qos)."""
    asked = SlurmConfig(time=array.options.get("time")).time_seconds
    if asked is None or "qos" in array.options:
        return
    lines = [line.split("|") for line in client.call("sinfo", "--noheader", "--format=%P|%l").splitlines()]
    wanted = array.options.get("partition", "").split(",")
    limits = {
        p.rstrip("*"): limit for p, limit in lines if p.rstrip("*") in wanted or wanted == [""] and p.endswith("*")
    }
    if limits and all((most := client.seconds(limit)) is not None and most < asked for limit in limits.values()):
        given = ", ".join(f"{p} {limit}" for p, limit in limits.items())
        raise ClusterError(
            f"slurm.time={array.options['time']} is more than the partition gives ({given})",
            fix="override slurm.time or slurm.partition",
        )


def script(array: Array, sweep_dir: Path) -> str:
    """The sbatch script of an array, as it would be submitted."""
    return _script(array, sweep_dir, sweep_dir / ".submitit" / "runs.json")


def submit(runs: list[JobRequest], sweep_dir: Path, cwd: str) -> SubmitResult:
    """Submit runs whose configs are frozen in their folders.

    Args:
        runs: all of them in the manifest of `sweep_dir`.
        sweep_dir: logs go to its `.submitit`.
        cwd: the jobs' working directory.
    Raises:
        ClusterError: SLURM refused an array, in its own words with the setting to change; those before it are submitted,
            entered in the manifest, and named.
    """
    sweep_dir = sweep_dir.absolute()
    (sweep_dir / ".submitit").mkdir(parents=True, exist_ok=True)  # before any job may start and want its log there
    waiting, outcome = arrays_of(runs), SubmitResult([])
    try:
        for array in waiting:
            _check_time(array)
            if len(waiting) > 1:  # all or nothing, as far as SLURM can tell beforehand
                test_only(array, sweep_dir, cwd)
    except ClusterError as error:
        if not any(words in str(error) for words in _FULL):
            raise _with_submitted(error, outcome) from None
    with progress("submitting", len(runs)) as bar:
        while waiting:
            array = waiting.pop(0)
            try:
                _submit_array(array, sweep_dir, cwd)
            except ClusterError as error:
                if not any(words in str(error) for words in _FULL):
                    raise _with_submitted(refused(error), outcome) from None
                outcome.why = str(error)
                if len(array.runs) == 1:
                    outcome.left = [r for a in [array, *waiting] for r in a.runs]
                    break
                half = len(array.runs) // 2
                rest = Array(array.options, array.runs[half:], array.parallel, array if array.parallel else None)
                array.runs = array.runs[:half]
                waiting[:0] = [array, rest]
            else:
                outcome.arrays.append(array)
                bar.advance(steps=len(array.runs))
    for folder in (f for run in outcome.left for f in run.folders):
        _not_submitted(folder, outcome.why)
    return outcome


def _with_submitted(error: ClusterError, outcome: SubmitResult) -> ClusterError:
    if not outcome.arrays:
        return ClusterError(f"{error}; nothing was submitted", error.fix)
    ids = ", ".join(a.job_id for a in outcome.arrays)
    return ClusterError(f"{error}; submitted before that and in sweep.json: job {ids}", error.fix)


def _not_submitted(run: Path, why: str) -> None:
    status = read_status(run) or RunStatus(INTERRUPTED)
    status.state, status.reason = INTERRUPTED, f"not submitted: {why}; later: cruijff-kit resume"
    write_status(run, status)


def _submit_array(array: Array, sweep_dir: Path, cwd: str) -> None:
    name = f"{now().replace(':', '')}_{uuid.uuid4().hex[:6]}"
    runs_file = sweep_dir / ".submitit" / f"{name}_runs.json"
    path = sweep_dir / ".submitit" / f"{name}_submission.sh"
    write_text(runs_file, json.dumps({"code": code_hash(), "runs": [r.listed for r in array.runs]}) + "\n")
    write_text(path, _script(array, sweep_dir, runs_file))
    for run in array.runs:
        for folder in run.folders:
            mark_queued(folder, run.reason, run.changes)
    _enter(array, sweep_dir, path)
    try:
        said = client.call("sbatch", "--parsable", f"--chdir={cwd}", str(path), seconds=_SECONDS_TO_SUBMIT)
    except ClusterError as error:
        if "did not answer" not in str(error):  # then it may have been taken: the manifest keeps its script
            _strike_out(array, sweep_dir, path)
            path.unlink()
            runs_file.unlink()
        raise
    array.job_id = said.strip().partition(";")[0]
    _enter(array, sweep_dir, path)
    json_output.extend(submitted=_as_data(array, sweep_dir))


def _as_data(array: Array, sweep_dir: Path) -> list[dict[str, Any]]:
    """The runs of an array that was submitted, as --json names them."""
    folders = {folder for run in array.runs for folder in run.folders}
    entries = [(e, resolve_folder(sweep_dir, e)) for e in read_sweep_manifest(sweep_dir).runs]
    return [{"name": e.name, "folder": str(f), "job_id": e.submissions[-1].job_id} for e, f in entries if f in folders]


def _enter(array: Array, sweep_dir: Path, path: Path) -> None:
    """Write the attempt of each run into the manifest, or complete it with the job's id."""
    many = len(array.runs) > 1
    with edit_sweep_manifest(sweep_dir) as manifest:
        entries = {resolve_folder(sweep_dir, e): e for e in manifest.runs}
        for task, run, folder in ((n, r, f) for n, r in enumerate(array.runs) for f in r.folders):
            submissions = entries[folder].submissions
            if not submissions or submissions[-1].script != str(path):
                number = task if many else None
                new = Submission(
                    now(), str(path), number, request=array.options, reason=run.reason, changes=run.changes
                )
                submissions.append(new)
            if array.job_id is not None:
                submissions[-1].job_id = f"{array.job_id}_{task}" if many else array.job_id


def _strike_out(array: Array, sweep_dir: Path, path: Path) -> None:
    with edit_sweep_manifest(sweep_dir) as manifest:
        for entry in manifest.runs:
            entry.submissions = [a for a in entry.submissions if a.script != str(path)]


def _script(array: Array, sweep_dir: Path, runs_file: Path) -> str:
    python = shlex.quote(sys.executable)
    job = f"{python} -u -m cruijff_kit.sweep.job {shlex.quote(str(runs_file))}"
    options = {**array.options, "stderr_to_stdout": True}
    options.setdefault("wckey", None)  # submitit would set its own
    options["setup"] = ["rc=0", *options["setup"]]
    options["teardown"] = [*options["teardown"], f"[ $rc = 0 ] || {job} --ended $rc", "exit $rc"]
    if array.after is not None:
        before = array.after.job_id or "THE_ARRAY_BEFORE"
        options["dependency"] = ",".join(filter(None, [options.get("dependency"), f"afterany:{before}"]))
    executor = submitit.SlurmExecutor(sweep_dir / ".submitit")
    executor.update_parameters(**options)
    if len(array.runs) > 1:
        executor.parameters["map_count"] = len(array.runs)
        executor.parameters["array_parallelism"] = array.parallel or len(array.runs)
    return executor._make_submission_file_text(f"{job} || rc=$?", "")


def refused(error: ClusterError) -> ClusterError:
    """sbatch's own words, and which setting they are about."""
    plain = str(error).removeprefix("Batch job submission failed: ").removeprefix("allocation failure: ")
    cures = [cure for sign, cure in _CURES.items() if sign in plain.lower()]
    valid = _partitions() if "slurm.partition" in cures and "account" not in plain.lower() else []
    there = f" (there are: {', '.join(valid)})" if valid else ""
    cure = f"override {' or '.join(cures)}{there}" if cures else None
    return ClusterError(f"sbatch: {plain}" + (f"; {cure}" if cure else ""), cure or error.fix)


def _partitions() -> list[str]:
    try:
        return sorted(set(client.call("sinfo", "--noheader", "--format=%R").split()))
    except ClusterError:
        return []
