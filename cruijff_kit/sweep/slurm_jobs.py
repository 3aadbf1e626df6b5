"""The SLURM jobs that runs make."""

from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit.config.run import RunConfig
from cruijff_kit.runs.estimate import CostEstimate
from cruijff_kit.runs.multi_lora_runs import plan_groups
from cruijff_kit.slurm.request import sbatch_options
from cruijff_kit.util.format import format_duration
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.slurm.submit import JobRequest


def make_job_requests(
    configs: list[RunConfig], folders: list[Path], estimates: list[CostEstimate | None]
) -> "list[JobRequest]":
    """Make the jobs of runs; runs that train together are one job."""
    from cruijff_kit.slurm.submit import JobRequest

    seconds = [e.seconds if e else 0.0 for e in estimates]
    jobs = []
    for group in plan_groups(configs, seconds):
        config = configs[group.runs[0]]
        runs = [folders[n] for n in group.runs]
        jobs.append(JobRequest(runs, sbatch_options(config), config.slurm.max_parallel, at_once=group.at_once))
        if len(runs) > 1:
            _warn_of_little_time(config, len(runs), sum(seconds[n] for n in group.runs))
    return jobs


def _warn_of_little_time(config: RunConfig, num_runs: int, seconds: float) -> None:
    limit = config.slurm.time_seconds
    if limit is not None and seconds > limit:
        say(
            f"warning: {num_runs} runs share a job of slurm.time={config.slurm.time} and take "
            f"{format_duration(seconds)} one after another by the estimate; when it ends "
            "they are requeued and continue from there"
        )
