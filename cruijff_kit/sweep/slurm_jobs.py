"""The SLURM jobs that runs make."""

from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit.config.run import RunConfig
from cruijff_kit.runs.estimate import Estimate
from cruijff_kit.runs.multi_lora_runs import plan_groups
from cruijff_kit.slurm.request import sbatch_options
from cruijff_kit.util.format import clock
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.slurm.submit import JobRequest


def make_job_requests(
    configs: list[RunConfig], folders: list[Path], expected: list[Estimate | None]
) -> "list[JobRequest]":
    """The jobs that runs make: those of a pack are one."""
    from cruijff_kit.slurm.submit import JobRequest

    seconds = [e.seconds if e else 0.0 for e in expected]
    jobs = []
    for pack in plan_groups(configs, seconds):
        first, config = folders[pack.runs[0]], configs[pack.runs[0]]
        jobs.append(JobRequest(first, sbatch_options(config), config.slurm.max_parallel))
        if len(pack.runs) > 1:
            jobs[-1].together, jobs[-1].at_once = [folders[n] for n in pack.runs], pack.at_once or 0
            _warn_of_little_time([configs[n] for n in pack.runs], sum(seconds[n] for n in pack.runs))
    return jobs


def _warn_of_little_time(pack: list[RunConfig], seconds: float) -> None:
    limit = pack[0].slurm.time_seconds
    if limit is not None and seconds > limit:
        say(
            f"warning: {len(pack)} runs share a job of slurm.time={pack[0].slurm.time} and take {clock(seconds)} one after "
            "another by the estimate; at its end they go back into the queue and go on from there"
        )
