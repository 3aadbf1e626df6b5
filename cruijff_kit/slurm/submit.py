"""Submit runs: one array of SLURM jobs per distinct request, entered in sweep.json before and after sbatch is called.

submitit writes the sbatch script. Its jobs run sweep/job.py, which reads the saved config from each run's folder: nothing
has to be unpickled, and a job may start before sbatch has returned.
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
from cruijff_kit.records.run_status import RunState, RunStatus, mark_queued, read_status, write_status
from cruijff_kit.records.sweep_manifest import (
    EVALUATE,
    FIRST,
    Submission,
    edit_sweep_manifest,
    read_sweep_manifest,
    resolve_folder,
)
from cruijff_kit.records.versions import code_hash
from cruijff_kit.slurm import client
from cruijff_kit.slurm.request import describe, group_equal, share_limit, split
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import progress

_SECONDS_TO_SUBMIT = 120
_QUEUE_FULL = (
    "submit limit",
    "MaxSubmit",
    "job array specification",
    "MaxJobCount",
    "temporarily unable to accept job",
)
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
    """A job that is to be submitted: runs to train, or to evaluate."""

    runs: list[Path]
    """Folders of its runs; several train together, or are evaluated one after another."""
    options: dict[str, Any]
    """sbatch's options, in submitit's words."""
    max_parallel: int | None = None
    """slurm.max_parallel."""
    reason: str = FIRST
    """first, resume or evaluate."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the submission before."""
    at_once: int | None = None
    """Most of its runs that train at the same time; None: as many as measuring finds best."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the job in the file of runs that sweep/job.py reads."""
        folders = [str(run) for run in self.runs]
        return {"evaluate": folders} if self.reason == EVALUATE else {"train": folders, "at_once": self.at_once}


@dataclass
class Array:
    """Jobs that share a job array; an array of one job is a plain job."""

    options: dict[str, Any]
    jobs: list[JobRequest]
    parallel: int | None = None
    """Most of its jobs that run at the same time."""
    after: "Array | None" = None
    """The array that must end first."""
    job_id: str | None = None
    """SLURM's, once it is submitted."""

    def summary(self) -> str:
        """Describe the array in one line."""
        job = f"job {self.job_id}: " if self.job_id else ""
        limit = f", {self.parallel} at once" if self.parallel else ""
        num_runs, num_jobs = len(self.runs), len(self.jobs)
        in_jobs = "" if num_jobs == num_runs else f" in {num_jobs} job{'s' * (num_jobs > 1)}"
        return f"{job}{num_runs} run{'s' * (num_runs != 1)}{in_jobs}{limit}; {describe(self.options)}"

    @property
    def runs(self) -> list[Path]:
        """Folders of the runs of all its jobs."""
        return [run for job in self.jobs for run in job.runs]


@dataclass
class SubmitResult:
    """Result of a submission."""

    arrays: list[Array]
    """Arrays in the queue."""
    remaining: list[JobRequest] = field(default_factory=list)
    """Jobs that did not fit into the queue."""
    refusal: str | None = None
    """SLURM's message about the remaining jobs."""

    @property
    def remaining_runs(self) -> list[Path]:
        """Folders of the runs that did not fit into the queue."""
        return [run for job in self.remaining for run in job.runs]


def make_arrays(jobs: list[JobRequest]) -> list[Array]:
    """Put jobs with equal options into arrays, before anything is submitted.

    Raises:
        ClusterError: SLURM does not answer.
    """
    groups = split(group_equal([job.options for job in jobs]), _largest_array())
    limits = [job.max_parallel for job in jobs if job.max_parallel is not None]
    arrays = [Array(options, [jobs[i] for i in positions]) for options, positions in groups]
    shares = share_limit([len(a.jobs) for a in arrays], min(limits, default=None))
    for array, (parallel, after) in zip(arrays, shares, strict=True):
        array.parallel, array.after = parallel, None if after is None else arrays[after]
    return arrays


def _largest_array() -> int:
    config = client.config()
    per_site = re.search(r"max_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    sizes = [int(config.get("MaxArraySize", 1001)), *([int(per_site[1])] if per_site else [])]
    return max(1, min(sizes))


def try_with_sbatch(array: Array, sweep_dir: Path, cwd: str) -> str:
    """Return the answer of `sbatch --test-only` for an array: when it might start. Submit and write nothing.

    Raises:
        ClusterError: SLURM would refuse it.
    """
    _check_time(array)
    # Without its dependency: that array does not exist yet.
    text = _script(dataclasses.replace(array, after=None), sweep_dir, sweep_dir / ".submitit" / "runs.json")
    try:
        printed = client.call_both("sbatch", "--test-only", f"--chdir={cwd}", stdin=text, seconds=_SECONDS_TO_SUBMIT)
    except ClusterError as error:
        raise explain_refusal(error) from None
    return client.own_words("sbatch", printed)


def _check_time(array: Array) -> None:
    """Refuse more time than the partition gives: SLURM takes such a job and never starts it (but for some qos).

    Raises:
        ClusterError: the limit of every partition that the job names is lower.
    """
    requested = SlurmConfig(time=array.options.get("time")).time_seconds
    if requested is None or "qos" in array.options:
        return
    lines = [line.split("|") for line in client.call("sinfo", "--noheader", "--format=%P|%l").splitlines()]
    partitions = array.options.get("partition", "").split(",")
    limits = {
        name.rstrip("*"): limit
        for name, limit in lines
        if name.rstrip("*") in partitions or partitions == [""] and name.endswith("*")
    }
    if limits and all((most := client.seconds(limit)) is not None and most < requested for limit in limits.values()):
        text = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        raise ClusterError(
            f"slurm.time={array.options['time']} exceeds the partition's limit ({text})",
            fix="override slurm.time or slurm.partition",
        )


def format_script(array: Array, sweep_dir: Path) -> str:
    """Return the sbatch script of an array, as it would be submitted."""
    return _script(array, sweep_dir, sweep_dir / ".submitit" / "runs.json")


def submit(jobs: list[JobRequest], sweep_dir: Path, cwd: str) -> SubmitResult:
    """Submit runs whose configs are saved in their folders.

    Args:
        jobs: their runs are all in the manifest of `sweep_dir`.
        sweep_dir: logs go to its `.submitit`.
        cwd: the jobs' working directory.
    Raises:
        ClusterError: SLURM refused an array, in its own words with the setting to change; the arrays before it are
            submitted, entered in the manifest, and named.
    """
    sweep_dir = sweep_dir.absolute()
    (sweep_dir / ".submitit").mkdir(parents=True, exist_ok=True)  # before any job may start and want its log there
    waiting, result = make_arrays(jobs), SubmitResult([])
    try:
        for array in waiting:
            _check_time(array)
            if len(waiting) > 1:  # all or nothing, as far as SLURM can tell beforehand
                try_with_sbatch(array, sweep_dir, cwd)
    except ClusterError as error:
        if not _is_queue_full(error):
            raise _with_submitted(error, result) from None
    with progress("submitting", len(jobs)) as bar:
        while waiting:
            array = waiting.pop(0)
            try:
                _submit_array(array, sweep_dir, cwd)
            except ClusterError as error:
                if not _is_queue_full(error):
                    raise _with_submitted(explain_refusal(error), result) from None
                result.refusal = str(error)
                if len(array.jobs) == 1:
                    result.remaining = [job for a in [array, *waiting] for job in a.jobs]
                    break
                waiting[:0] = _halve(array)
            else:
                result.arrays.append(array)
                bar.advance(steps=len(array.jobs))
    for run in result.remaining_runs:
        _mark_not_submitted(run, result.refusal)
    return result


def _is_queue_full(error: ClusterError) -> bool:
    return any(words in str(error) for words in _QUEUE_FULL)


def _halve(array: Array) -> list[Array]:
    """Cut an array in two; arrays that wait for it keep waiting for its first half."""
    half = len(array.jobs) // 2
    rest = Array(array.options, array.jobs[half:], array.parallel, array if array.parallel else None)
    array.jobs = array.jobs[:half]
    return [array, rest]


def _with_submitted(error: ClusterError, result: SubmitResult) -> ClusterError:
    if not result.arrays:
        return ClusterError(f"{error}; nothing was submitted", error.fix)
    ids = ", ".join(a.job_id for a in result.arrays)
    return ClusterError(f"{error}; submitted before that and in sweep.json: job {ids}", error.fix)


def _mark_not_submitted(run: Path, refusal: str) -> None:
    status = read_status(run) or RunStatus(RunState.INTERRUPTED)
    status.state, status.reason = RunState.INTERRUPTED, f"not submitted: {refusal}; later: cruijff-kit resume"
    write_status(run, status)


def _submit_array(array: Array, sweep_dir: Path, cwd: str) -> None:
    name = f"{now().replace(':', '')}_{uuid.uuid4().hex[:6]}"
    runs_file = sweep_dir / ".submitit" / f"{name}_runs.json"
    script = sweep_dir / ".submitit" / f"{name}_submission.sh"
    write_text(runs_file, json.dumps({"code": code_hash(), "runs": [job.to_dict() for job in array.jobs]}) + "\n")
    write_text(script, _script(array, sweep_dir, runs_file))
    for job in array.jobs:
        for run in job.runs:
            mark_queued(run, job.reason, job.changes)
    _record_submission(array, sweep_dir, script)
    try:
        printed = client.call("sbatch", "--parsable", f"--chdir={cwd}", str(script), seconds=_SECONDS_TO_SUBMIT)
    except ClusterError as error:
        if "did not answer" not in str(error):  # then it may have been taken: the manifest keeps its script
            _remove_submission(sweep_dir, script)
            script.unlink()
            runs_file.unlink()
        raise
    array.job_id = printed.strip().partition(";")[0]
    _record_submission(array, sweep_dir, script)
    json_output.append(submitted=_submitted_rows(array, sweep_dir))


def _submitted_rows(array: Array, sweep_dir: Path) -> list[dict[str, Any]]:
    """Return the runs of an array, as --json names them."""
    submitted = set(array.runs)
    entries = [(e, resolve_folder(sweep_dir, e)) for e in read_sweep_manifest(sweep_dir).runs]
    return [
        {"name": e.name, "folder": str(run), "job_id": e.submissions[-1].job_id}
        for e, run in entries
        if run in submitted
    ]


def _record_submission(array: Array, sweep_dir: Path, script: Path) -> None:
    """Enter the submission of each run into the manifest, or add SLURM's job id to it."""
    is_array = len(array.jobs) > 1
    with edit_sweep_manifest(sweep_dir) as manifest:
        entries = {resolve_folder(sweep_dir, e): e for e in manifest.runs}
        for task, job, run in ((n, j, r) for n, j in enumerate(array.jobs) for r in j.runs):
            submissions = entries[run].submissions
            if not submissions or submissions[-1].script != str(script):
                new = Submission(now(), str(script), request=array.options, reason=job.reason, changes=job.changes)
                new.task = task if is_array else None
                submissions.append(new)
            if array.job_id is not None:
                submissions[-1].job_id = f"{array.job_id}_{task}" if is_array else array.job_id


def _remove_submission(sweep_dir: Path, script: Path) -> None:
    with edit_sweep_manifest(sweep_dir) as manifest:
        for entry in manifest.runs:
            entry.submissions = [s for s in entry.submissions if s.script != str(script)]


def _script(array: Array, sweep_dir: Path, runs_file: Path) -> str:
    python = shlex.quote(sys.executable)
    job = f"{python} -u -m cruijff_kit.sweep.job {shlex.quote(str(runs_file))}"
    options = {**array.options, "stderr_to_stdout": True}
    options.setdefault("wckey", None)  # submitit would set its own
    options["setup"] = ["rc=0", *options["setup"]]
    options["teardown"] = [*options["teardown"], f"[ $rc = 0 ] || {job} --ended $rc", "exit $rc"]
    if array.after is not None:
        previous_job = array.after.job_id or "THE_ARRAY_BEFORE"
        options["dependency"] = ",".join(filter(None, [options.get("dependency"), f"afterany:{previous_job}"]))
    executor = submitit.SlurmExecutor(sweep_dir / ".submitit")
    executor.update_parameters(**options)
    if len(array.jobs) > 1:
        executor.parameters["map_count"] = len(array.jobs)
        executor.parameters["array_parallelism"] = array.parallel or len(array.jobs)
    return executor._make_submission_file_text(f"{job} || rc=$?", "")


def explain_refusal(error: ClusterError) -> ClusterError:
    """sbatch's own words, and the setting that they are about."""
    plain = str(error).removeprefix("Batch job submission failed: ").removeprefix("allocation failure: ")
    cures = [cure for sign, cure in _CURES.items() if sign in plain.lower()]
    valid = _partitions() if "slurm.partition" in cures and "account" not in plain.lower() else []
    partitions = f" (there are: {', '.join(valid)})" if valid else ""
    cure = f"override {' or '.join(cures)}{partitions}" if cures else None
    return ClusterError(f"sbatch: {plain}" + (f"; {cure}" if cure else ""), cure or error.fix)


def _partitions() -> list[str]:
    try:
        return sorted(set(client.call("sinfo", "--noheader", "--format=%R").split()))
    except ClusterError:
        return []
