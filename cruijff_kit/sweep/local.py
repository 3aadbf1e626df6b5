"""Run a sweep on this machine, in this process.

In one process torch is imported once, the base model is read once, and each distinct data setting is tokenised once. Runs
that can share the base model train together (runs/multi_lora_runs.py), the others one after another.
"""

import functools
import math
import os
import socket

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cruijff_kit.analysis.summary import refresh_sweep_summary
from cruijff_kit.config.hydra_private import failure_of
from cruijff_kit.records.run_status import mark_queued, read_status, write_status
from cruijff_kit.runs.multi_lora_runs import GroupRun, PlannedGroup, plan_groups, run_group
from cruijff_kit.sweep.prepare import SweepRun
from cruijff_kit.sweep.task_config import set_swept
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import say

_OUR_CALLBACKS = {"run_start", "sweep_end"}


def run_here(launcher, runs: list[SweepRun]) -> dict[int, float | None]:
    """Run the runs; return their objectives by the id() of the run.

    The objective of a failed run is NaN: the rest of the sweep, and a sweeper that optimises, can continue. The failure
    is in its result.json, and `callbacks.SweepEnd` gives the command its exit code.
    """
    for run in runs:
        _queue(run)
    objectives: dict[int, float | None] = {}
    for group in _plan_groups(runs):
        members = [runs[n] for n in group.runs]
        labels = [f"[{n + 1}/{len(runs)}] " for n in group.runs]
        if len(members) > 1:
            say(group.summary(len(runs)))
            objectives |= _run_group(members, labels, group.at_once)
        else:
            objectives[id(members[0])] = _run(launcher, members[0], labels[0])
    return objectives


def _plan_groups(runs: list[SweepRun]) -> list[PlannedGroup]:
    """Plan groups with plan_groups; a run whose folder, environment or callbacks Hydra sets runs alone."""
    single_runs = [n for n, run in enumerate(runs) if _needs_hydra(run.composed.hydra)]
    grouped_runs = [n for n in range(len(runs)) if n not in single_runs]
    groups = plan_groups([runs[n].config for n in grouped_runs])
    return [PlannedGroup([grouped_runs[n] for n in g.runs], g.at_once, g.why) for g in groups] + [
        PlannedGroup([n], why="Hydra changes its folder or environment, or calls a callback for it")
        for n in single_runs
    ]


def _needs_hydra(hydra: DictConfig) -> bool:
    return bool(hydra.job.chdir or hydra.job.env_set or {*hydra.callbacks} - _OUR_CALLBACKS)


def _run_group(members: list[SweepRun], labels: list[str], at_once: int | None) -> dict[int, float | None]:
    group = [
        GroupRun(run.config, run.swept, label, functools.partial(_prepare_as_hydra, run))
        for run, label in zip(members, labels, strict=True)
    ]
    return {
        id(run): math.nan if isinstance(result, Exception) else result.objective
        for run, result in zip(members, run_group(group, at_once), strict=True)
    }


def _prepare_as_hydra(run: SweepRun) -> None:
    """Configure logging and write .hydra/ as hydra.core.utils.run_job does before it starts a run."""
    config, folder = run.composed, run.folder / str(run.composed.hydra.output_subdir)
    with read_write(config), open_dict(config), read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(run.folder.absolute())
    HydraConfig.instance().set_config(config)
    hydra = HydraConfig.get()
    configure_log(hydra.job_logging, hydra.verbose)
    if hydra.output_subdir is not None:
        folder.mkdir(parents=True, exist_ok=True)
        own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        saved = {"config": own, "hydra": HydraConfig.instance().cfg, "overrides": hydra.overrides.task}
        for name, node in saved.items():
            (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(node), encoding="utf-8")


def _queue(run: SweepRun) -> None:
    mark_queued(run.folder)
    status = read_status(run.folder)
    status.host, status.pid = socket.gethostname(), os.getpid()  # while this process lives, their turn may come
    write_status(run.folder, status)


def _run(launcher, run: SweepRun, label: str) -> float | None:
    say(f"{label}{run.name}")
    with set_swept(run.swept):
        returned: JobReturn = run_job(
            hydra_context=launcher.hydra_context,
            task_function=launcher.task_function,
            config=run.composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    refresh_sweep_summary(run.folder)
    if returned.status is JobStatus.FAILED:
        say(f"{label}{run.name} failed: {one_line(failure_of(returned))}")
        return math.nan
    return returned.return_value
