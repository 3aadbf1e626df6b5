"""Runs of a sweep on this machine, one after another in this process.

One process, so torch is imported once, the base model read once and each distinct data setting tokenised once. With
pack=N so many runs that can share the base model train together (packs.py).
"""

import math
import os
import socket

from hydra.core.utils import JobReturn, JobStatus, run_job

from cruijff_kit.errors import one_line
from cruijff_kit.launch.jobs import Job
from cruijff_kit.launch.task import swept_by
from cruijff_kit.packs import packs_of, run_pack
from cruijff_kit.progress import say
from cruijff_kit.run_status import queued_again, read_status, write_status
from cruijff_kit.summary import refresh_above


def run_here(launcher, jobs: list[Job]) -> dict[int, float | None]:
    """Run the jobs; their objectives by place.

    A failed run's is NaN, so that the rest of the sweep, and a sweeper that optimises, can go on; the failure stands in its
    result.json, and `callback.SweepEnd` gives the command its exit code.
    """
    for job in jobs:
        _queue(job)
    objectives: dict[int, float | None] = {}
    for pack in packs_of([job.config for job in jobs]):
        chosen = [jobs[n] for n in pack.runs]
        if len(chosen) > 1:
            say(pack.in_words(len(jobs)))
            objectives |= _run_pack(chosen, pack.at_once)
        else:
            objectives |= {id(job): _run(launcher, job, jobs.index(job) + 1, len(jobs)) for job in chosen}
    return objectives


def _run_pack(chosen: list[Job], at_once: int) -> dict[int, float | None]:
    ended = run_pack([(job.config, job.swept) for job in chosen], at_once)
    return {
        id(job): math.nan if isinstance(result, Exception) else result.objective
        for job, result in zip(chosen, ended, strict=True)
    }


def _queue(job: Job) -> None:
    queued_again(job.folder)
    status = read_status(job.folder)
    status.host, status.pid = socket.gethostname(), os.getpid()  # while this process lives, their turn may come
    write_status(job.folder, status)


def _run(launcher, job: Job, place: int, total: int) -> float | None:
    say(f"[{place}/{total}] {job.name}")
    with swept_by(job.swept):
        returned: JobReturn = run_job(
            hydra_context=launcher.hydra_context,
            task_function=launcher.task_function,
            config=job.composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    refresh_above(job.folder)
    if returned.status is JobStatus.FAILED:
        say(f"[{place}/{total}] {job.name} failed: {one_line(returned._return_value)}")
        return math.nan
    return returned.return_value
