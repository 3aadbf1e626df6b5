"""SLURM's commands: called with a time limit, their output as data, their refusals in one line.

Works with and without accounting: squeue knows what is queued or running, sacct what has ended, and where there is no
accounting scontrol remembers a job for a while (MinJobAge).
"""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from cruijff_kit.util.errors import ClusterError, one_line

_SECONDS_TO_ANSWER = 10.0
_ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
)  # fmt: skip


@dataclass(frozen=True)
class JobInfo:
    """SLURM's description of a job."""

    job_id: str
    """17 or 17_3."""
    state: str
    """SLURM's word, such as PENDING."""
    reason: str | None = None
    """Reason of its state, in SLURM's words."""
    node: str | None = None
    exit_code: int | None = None
    """None while unknown; 128 + N for signal N."""

    @property
    def ended(self) -> bool:
        """Whether no part of the job is queued or running."""
        return self.state in _ENDED


def call(*command: str, seconds: float = _SECONDS_TO_ANSWER, stdin: str | None = None) -> str:
    """Run a command of SLURM and return what it prints.

    Raises:
        ClusterError: it is not installed, did not answer in time, or failed.
    """
    return _run(command, seconds, stdin).stdout


def call_both(*command: str, seconds: float = _SECONDS_TO_ANSWER, stdin: str | None = None) -> str:
    """Run a command as `call` does and append stderr: `sbatch --test-only` answers there."""
    process = _run(command, seconds, stdin)
    return process.stdout + process.stderr


def _run(command: tuple[str, ...], seconds: float, stdin: str | None) -> subprocess.CompletedProcess[str]:
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, input=stdin, env=_make_environment()
        )
    except FileNotFoundError:
        raise ClusterError(
            f"there is no {command[0]} on this machine; use a machine with SLURM's commands (a login node), "
            "or run locally: slurm=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} did not answer within {seconds:.0f} s", fix="try again later") from None
    if process.returncode != 0:
        words = own_words(command[0], process.stderr or process.stdout) or f"{command[0]} failed"
        raise ClusterError(words, fix="cruijff-kit doctor shows what this cluster has")
    return process


def _make_environment() -> dict[str, str]:
    # Users set formats for their own eyes; ours are parsed.
    formats = ("SQUEUE_FORMAT", "SQUEUE_FORMAT2", "SQUEUE_STATES", "SQUEUE_SORT", "SACCT_FORMAT", "SINFO_FORMAT")
    return {k: v for k, v in os.environ.items() if k not in formats} | {"SLURM_TIME_FORMAT": "standard"}


def own_words(command: str, stderr: str) -> str:
    """Return the messages of a command without its name in front, in one line."""
    lines = (line.removeprefix(f"{command}: ").removeprefix("error: ") for line in stderr.splitlines())
    return one_line("; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))) if stderr.strip() else ""


def job_infos(job_ids: Iterable[str]) -> dict[str, JobInfo]:
    """Return SLURM's description of jobs, by id; jobs that it has forgotten are left out.

    Raises:
        ClusterError: SLURM does not answer.
    """
    ids = set(job_ids)
    if not ids:
        return {}
    infos = {i: info for i, info in _query_squeue(ids).items() if i in ids}
    for query in (_query_sacct, _query_scontrol):
        missing = ids - set(infos)
        if missing:
            # Just after a job's end accounting may still call it running, and squeue has said that it is not.
            answers = query(missing)
            # An array that was cancelled before it started is remembered as one job.
            answers = {i: answers.get(i) or answers.get(i.partition("_")[0]) for i in missing}
            infos |= {i: info for i, info in answers.items() if info is not None and info.ended}
    return infos


def _bases(job_ids: Iterable[str]) -> list[str]:
    return sorted({i.partition("_")[0] for i in job_ids}, key=int)


def _query_squeue(job_ids: set[str]) -> dict[str, JobInfo]:
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", "--jobs", ",".join(_bases(job_ids))]
    try:
        text = call(*command)
    except ClusterError as error:
        if "Invalid job id" in str(error):  # none of them is in the queue
            return {}
        raise
    infos = {}
    for line in text.splitlines():
        job_id, state, reason, node = line.split("|")
        waits = reason if state == "PENDING" and reason != "None" else None
        infos[job_id] = JobInfo(job_id, state, waits, node or None)
    return infos


def _query_sacct(job_ids: set[str]) -> dict[str, JobInfo]:
    command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode,NodeList", "-j", ",".join(_bases(job_ids))]
    try:
        text = call(*command)
    except ClusterError:  # no accounting, or its database is down
        return {}
    infos = {}
    for line in text.splitlines():
        job_id, state, exit_code, node = line.split("|")
        word, _, by = state.partition(" ")
        base, _, tasks = job_id.partition("_")
        for array_id in _array_ids(base, tasks):
            infos[array_id] = JobInfo(array_id, word, by or None, node or None, _exit_code(exit_code))
    return infos


def _query_scontrol(job_ids: set[str]) -> dict[str, JobInfo]:
    infos = {}
    for base in _bases(job_ids):
        try:
            text = call("scontrol", "--oneliner", "show", "job", base)
        except ClusterError as error:
            if "Invalid job id" in str(error):
                continue
            raise
        for fields in map(key_values, text.splitlines()):
            reason = fields.get("Reason")
            array = fields.get("ArrayJobId", fields["JobId"])
            for job_id in [fields["JobId"], *_array_ids(array, fields.get("ArrayTaskId", ""))]:
                infos[job_id] = JobInfo(
                    job_id,
                    fields["JobState"],
                    None if reason == "None" else reason,
                    fields.get("NodeList"),
                    _exit_code(fields.get("ExitCode", "")),
                )
    return infos


def _array_ids(base: str, tasks: str) -> list[str]:
    """Expand the ids of jobs that SLURM names together, which it does for jobs that never began: 3, [0-2,7%4] or none."""
    if not tasks:
        return [base]
    ids = []
    for part in tasks.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            ids += [f"{base}_{i}" for i in range(int(first), int(last or first) + 1)]
    return ids


def key_values(line: str) -> dict[str, str]:
    """Parse a line of `scontrol --oneliner show`: Key=value Key=value ..."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _exit_code(text: str) -> int | None:
    """Parse SLURM's code:signal."""
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return 128 + int(number) if number.isdigit() and int(number) else int(code)


def seconds(text: str) -> int | None:
    """Parse SLURM's D-HH:MM:SS, HH:MM:SS or MM:SS; None for UNLIMITED and INVALID."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) not in (2, 3) or not all(p.isdigit() for p in [*parts, days or "0"]):
        return None
    h, m, s = map(int, ["0", *parts][-3:])
    return ((int(days or 0) * 24 + h) * 60 + m) * 60 + s


def config() -> dict[str, str]:
    """Return the cluster's configuration: `scontrol show config` as key -> value.

    Raises:
        ClusterError: SLURM does not answer.
    """
    pairs = (line.split("=", 1) for line in call("scontrol", "show", "config").splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def job_of_script(script: str) -> str | None:
    """Return the id of the array (or job) that a script became, if it is in the queue of this user; None if not."""
    for line in call("squeue", "--noheader", "--me", "--format=%F|%o").splitlines():
        job_id, _, command = line.partition("|")
        if command == script:
            return job_id
    return None


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs. Raises ClusterError when SLURM refuses; a job that has ended already is no error."""
    ids = sorted(job_ids)
    for i in range(0, len(ids), 200):
        call("scancel", "--quiet", *ids[i : i + 200], seconds=60)


def requeue(job_id: str, mem_mb: int | None = None) -> None:
    """Requeue a job, with more memory if that is given. (It starts after a minute or more.)

    Raises:
        ClusterError: not allowed here.
    """
    call("scontrol", "requeue", job_id, seconds=60)
    if mem_mb is not None:
        call("scontrol", "update", f"JobId={job_id}", f"MinMemoryNode={mem_mb}", seconds=60)
