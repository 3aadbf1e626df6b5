"""A sweep: all runs are composed and checked first; then those that are new are submitted or run here."""

import math
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cruijff_kit.analysis.summary import write_summary
from cruijff_kit.config.hydra_nodes import SweeperConfig
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.records.result import higher_is_better, read_result
from cruijff_kit.records.run_folder import discard_unused
from cruijff_kit.records.run_status import DONE
from cruijff_kit.sweep.dry_run import show
from cruijff_kit.sweep.finish import write_and_print
from cruijff_kit.sweep.local import run_here
from cruijff_kit.sweep.on_slurm import submit_jobs
from cruijff_kit.sweep.prepare import SweepRun, estimate, find_existing, prepare, save_manifest
from cruijff_kit.sweep.scaffold import check_arrays, print_scaffold
from cruijff_kit.sweep.task_config import start_output, warn_ignored_overrides
from cruijff_kit.util.errors import UserError


def launch(launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
    """Start every run of a sweep (or of a batch of it), and return their objectives.

    None for a run that is only submitted; NaN for one that failed.

    Raises:
        UserError: a run that cannot work; none was started.
        SystemExit: with code 0, after a dry run.
    """
    sweep_dir = Path(str(launcher.config.hydra.sweep.dir))
    try:
        jobs = prepare(launcher, job_overrides, initial_job_idx, sweep_dir)
        warn_ignored_overrides(jobs[0].config, OmegaConf.to_container(launcher.config.hydra.overrides.task))
        if jobs[0].config.dry_run:
            show([(job.config, job.swept) for job in jobs], sweep_dir)
            raise SystemExit(0)  # a sweeper that optimises would ask for an objective
        _reject_search_without_objective(launcher, jobs)
        find_existing(jobs, sweep_dir)
        start_output(sweep_dir)
        estimate(jobs, sweep_dir)
        if jobs[0].config.scaffold:
            check_arrays(jobs, sweep_dir)
        save_manifest(jobs, sweep_dir, typed_arguments(OmegaConf.to_container(launcher.config.hydra)))
        write_summary(sweep_dir)
        if jobs[0].config.scaffold:
            print_scaffold(jobs, sweep_dir)
            raise SystemExit(0)
        return _start(launcher, jobs, sweep_dir)
    except KeyboardInterrupt:
        # Hydra does not call the callback then.
        write_and_print(sweep_dir)
        raise
    finally:
        discard_unused(sweep_dir)


def _reject_search_without_objective(launcher, jobs: list[SweepRun]) -> None:
    lists = (SweeperConfig._target_, "hydra._internal.core_plugins.basic_sweeper.BasicSweeper")
    sweeper, objective = launcher.config.hydra.sweeper, jobs[0].config.objective_name
    searches = sweeper._target_ not in lists
    if searches and objective is None:
        raise UserError(
            "a sweeper that optimises needs an objective, and without a validation split there is none; set "
            "dataset.validation_split, or name one: objective=accuracy (measured on the test split)"
        )
    if searches and "direction" in sweeper:
        asked, best = getattr(sweeper.direction, "name", sweeper.direction), "minimize"
        if higher_is_better(objective):
            best = "maximize"
        if asked in ("minimize", "maximize") and asked != best:
            raise UserError(
                f"hydra.sweeper.direction={asked} looks for the worst {objective}; set hydra.sweeper.direction={best}"
            )
    if searches and any(j.config.slurm.submit and not j.config.slurm.wait for j in jobs):
        raise UserError("a sweeper that optimises needs each run's objective; add slurm.wait=true")


def _start(launcher, jobs: list[SweepRun], sweep_dir: Path) -> list[JobReturn]:
    new = [j for j in jobs if j.existing is None]
    objectives: dict[int, float | None] = {}
    there = [j for j in jobs if j.config.slurm.submit]
    if there:
        objectives |= submit_jobs(there, sweep_dir)
    objectives |= run_here(launcher, [j for j in new if not j.config.slurm.submit])
    for job in jobs:
        if job.existing_state == DONE:
            objectives[id(job)] = read_result(job.existing / "result.json").objective
    return [_returned(job, objectives.get(id(job))) for job in jobs]


def _returned(job: SweepRun, objective: float | None) -> JobReturn:
    done = JobReturn(overrides=[], cfg=job.composed, status=JobStatus.COMPLETED)
    done.return_value = math.nan if objective is None and job.config.slurm.wait else objective
    return done
