"""Start a sweep: compose and check all runs first, then submit the new ones or run them here."""

import math
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cruijff_kit.analysis.summary import write_summary
from cruijff_kit.config.hydra_nodes import SweeperConfig
from cruijff_kit.config.hydra_private import BASIC_SWEEPER
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.records.result import higher_is_better, read_result
from cruijff_kit.records.run_folder import discard_unused
from cruijff_kit.records.run_status import RunState
from cruijff_kit.sweep.dry_run import show
from cruijff_kit.sweep.finish import write_and_print
from cruijff_kit.sweep.local import run_here
from cruijff_kit.sweep.on_slurm import submit_runs
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
        runs = prepare(launcher, job_overrides, initial_job_idx, sweep_dir)
        config = runs[0].config
        warn_ignored_overrides(config, OmegaConf.to_container(launcher.config.hydra.overrides.task))
        if config.dry_run:
            show([(run.config, run.swept) for run in runs], sweep_dir)
            raise SystemExit(0)  # a sweeper that optimises would ask for an objective
        _reject_search_without_objective(launcher, runs)
        find_existing(runs, sweep_dir)
        start_output(sweep_dir)
        estimate(runs, sweep_dir)
        if config.scaffold:
            check_arrays(runs, sweep_dir)
        save_manifest(runs, sweep_dir, typed_arguments(OmegaConf.to_container(launcher.config.hydra)))
        write_summary(sweep_dir)
        if config.scaffold:
            print_scaffold(runs, sweep_dir)
            raise SystemExit(0)
        return _start(launcher, runs, sweep_dir)
    except KeyboardInterrupt:
        # Hydra does not call the callback then.
        write_and_print(sweep_dir)
        raise
    finally:
        discard_unused(sweep_dir)


def _reject_search_without_objective(launcher, runs: list[SweepRun]) -> None:
    lists = (SweeperConfig._target_, BASIC_SWEEPER)
    sweeper, objective = launcher.config.hydra.sweeper, runs[0].config.objective_name
    if sweeper._target_ in lists:
        return
    if objective is None:
        raise UserError(
            "a sweeper that optimises needs an objective, and without a validation split there is none; set "
            "dataset.validation_split, or name one: objective=accuracy (measured on the test split)"
        )
    if "direction" in sweeper:
        direction = getattr(sweeper.direction, "name", sweeper.direction)
        best = "maximize" if higher_is_better(objective) else "minimize"
        if direction in ("minimize", "maximize") and direction != best:
            raise UserError(
                f"hydra.sweeper.direction={direction} searches for the worst {objective}; "
                f"set hydra.sweeper.direction={best}"
            )
    if any(run.config.slurm.submit and not run.config.slurm.wait for run in runs):
        raise UserError("a sweeper that optimises needs each run's objective; add slurm.wait=true")


def _start(launcher, runs: list[SweepRun], sweep_dir: Path) -> list[JobReturn]:
    objectives: dict[int, float | None] = {}
    if on_slurm := [run for run in runs if run.config.slurm.submit]:
        objectives |= submit_runs(on_slurm, sweep_dir)
    objectives |= run_here(launcher, [run for run in runs if run.existing is None and not run.config.slurm.submit])
    for run in runs:
        if run.existing_state == RunState.DONE:
            objectives[id(run)] = read_result(run.existing / "result.json").objective
    return [_job_return(run, objectives.get(id(run))) for run in runs]


def _job_return(run: SweepRun, objective: float | None) -> JobReturn:
    returned = JobReturn(overrides=[], cfg=run.composed, status=JobStatus.COMPLETED)
    returned.return_value = math.nan if objective is None and run.config.slurm.wait else objective
    return returned
