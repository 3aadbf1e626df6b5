"""Runs of a sweep on this machine, in this process.

One process, so torch is imported once, the base model read once and each distinct data setting tokenised once. Runs that
can share the base model train together (packs.py), the others one after another.
"""

import functools
import math
import os
import socket

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cruijff_kit.analysis.summary import refresh_above
from cruijff_kit.records.run_status import mark_queued, read_status, write_status
from cruijff_kit.runs.multi_lora_runs import GroupRun, PlannedGroup, plan_groups, run_group
from cruijff_kit.sweep.prepare import SweepRun
from cruijff_kit.sweep.task_config import set_swept
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import say

_OUR_CALLBACKS = {"run_start", "sweep_end"}


def run_here(launcher, jobs: list[SweepRun]) -> dict[int, float | None]:
    """Run the jobs; their objectives by place.

    A failed run's is NaN, so that the rest of the sweep, and a sweeper that optimises, can go on; the failure stands in its
    result.json, and `callback.SweepEnd` gives the command its exit code.
    """
    for job in jobs:
        _queue(job)
    objectives: dict[int, float | None] = {}
    for pack in _packs(jobs):
        chosen = [jobs[n] for n in pack.runs]
        if len(chosen) > 1:
            say(pack.summary(len(jobs)))
            places = [f"[{n + 1}/{len(jobs)}] " for n in pack.runs]
            objectives |= _run_group(chosen, places, pack.at_once)
        else:
            objectives |= {id(job): _run(launcher, job, jobs.index(job) + 1, len(jobs)) for job in chosen}
    return objectives


def _packs(jobs: list[SweepRun]) -> list[PlannedGroup]:
    """As plan_groups; a run that Hydra itself has to do something for, while it goes on, is alone."""
    own = [n for n, job in enumerate(jobs) if _is_hydras(job.composed.hydra)]
    others = [n for n in range(len(jobs)) if n not in own]
    packs = plan_groups([jobs[n].config for n in others])
    return [PlannedGroup([others[n] for n in p.runs], p.at_once, p.why) for p in packs] + [
        PlannedGroup([n], why="Hydra changes its folder or environment, or calls a callback for it") for n in own
    ]


def _is_hydras(hydra: DictConfig) -> bool:
    return bool(hydra.job.chdir or hydra.job.env_set or {*hydra.callbacks} - _OUR_CALLBACKS)


def _run_group(chosen: list[SweepRun], places: list[str], at_once: int | None) -> dict[int, float | None]:
    runs = [
        GroupRun(job.config, job.swept, place, functools.partial(_begin_as_hydra, job))
        for job, place in zip(chosen, places, strict=True)
    ]
    return {
        id(job): math.nan if isinstance(result, Exception) else result.objective
        for job, result in zip(chosen, run_group(runs, at_once), strict=True)
    }


def _begin_as_hydra(job: SweepRun) -> None:
    """What Hydra leaves in a run's folder before it starts the run (hydra.core.utils.run_job)."""
    config, place = job.composed, job.folder / str(job.composed.hydra.output_subdir)
    with read_write(config), open_dict(config), read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(job.folder.absolute())
    HydraConfig.instance().set_config(config)
    hydra = HydraConfig.get()
    configure_log(hydra.job_logging, hydra.verbose)
    if hydra.output_subdir is not None:
        place.mkdir(parents=True, exist_ok=True)
        own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        saved = {"config": own, "hydra": HydraConfig.instance().cfg, "overrides": hydra.overrides.task}
        for name, node in saved.items():
            (place / f"{name}.yaml").write_text(OmegaConf.to_yaml(node), encoding="utf-8")


def _queue(job: SweepRun) -> None:
    mark_queued(job.folder)
    status = read_status(job.folder)
    status.host, status.pid = socket.gethostname(), os.getpid()  # while this process lives, their turn may come
    write_status(job.folder, status)


def _run(launcher, job: SweepRun, place: int, total: int) -> float | None:
    say(f"[{place}/{total}] {job.name}")
    with set_swept(job.swept):
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
