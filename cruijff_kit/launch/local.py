"""A sweep on this machine: all runs are composed and checked first, then run one after another in this process.

One process, so torch is imported once, the base model read once and each distinct data setting tokenised once.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job
from omegaconf import DictConfig, OmegaConf, open_dict

from cruijff_kit.config import RunConfig
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.folder import RunFolder, discard_unused
from cruijff_kit.launch.callback import write_and_show
from cruijff_kit.launch.dry_run import show
from cruijff_kit.launch.names import run_name, swept_keys, swept_values
from cruijff_kit.launch.task import load_task, swept_by
from cruijff_kit.plan import check
from cruijff_kit.progress import say


@dataclass
class Job:
    """One run of the sweep, composed."""

    folder: Path
    swept: dict[str, Any]
    config: DictConfig

    @property
    def name(self) -> str:
        """The name that the run goes by."""
        return self.config.run_name


def launch(launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
    """Check every run, then run them.

    A failed run's return value is NaN, so that the rest of the sweep, and a sweeper that optimises, can go on; the
    failure stands in its result.json, and `callback.SweepEnd` gives the command its exit code.

    Raises:
        UserError: a run that cannot work; none was started.
        SystemExit: with code 0, after a dry run.
    """
    sweep_dir = Path(str(launcher.config.hydra.sweep.dir))
    try:
        jobs = compose_jobs(launcher, job_overrides, initial_job_idx, sweep_dir)
        configs = _check_all(jobs)
        if jobs[0].config.dry_run:
            show([(config, job.swept) for config, job in zip(configs, jobs, strict=True)])
            raise SystemExit(0)  # a sweeper that optimises would ask for an objective
        for job, config in zip(jobs, configs, strict=True):
            # Frozen, so that a run that the sweep never came to can be resumed too.
            RunFolder(config.output_dir).freeze(config, job.swept)
        return [_run(launcher, job, place, len(jobs)) for place, job in enumerate(jobs, 1)]
    except KeyboardInterrupt:
        # Hydra does not call the callback then.
        write_and_show(sweep_dir)
        raise
    finally:
        discard_unused(sweep_dir)


def compose_jobs(launcher, job_overrides, initial_job_idx: int, sweep_dir: Path) -> list[Job]:
    """Compose each run's config, named by what varies."""
    typed = OmegaConf.to_container(launcher.config.hydra.overrides.task)
    for_hydra = OmegaConf.to_container(launcher.config.hydra.overrides.hydra)
    keys = swept_keys(job_overrides, typed)
    chosen_by_user = any(o.startswith("hydra.sweep.subdir=") for o in for_hydra)
    taken = {p.name.lower() for p in sweep_dir.iterdir()} if sweep_dir.is_dir() else set()
    jobs = []
    for number, overrides in enumerate(job_overrides, initial_job_idx):
        config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
        swept = swept_values(config, keys, overrides)
        named_by_user = any(o.lstrip("+").startswith("run_name=") for o in overrides)
        name = run_name({"": config.run_name} if named_by_user else swept, taken).lstrip("=")
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.run_name = name
            if not chosen_by_user:
                config.hydra.sweep.subdir = name
        HydraConfig.instance().set_config(config)  # for a subdir of the user's that refers to ${hydra:...}
        jobs.append(Job(sweep_dir / str(config.hydra.sweep.subdir), swept, config))
    return jobs


def _check_all(jobs: list[Job]) -> list[RunConfig]:
    """The runs' typed configs, checked as far as can be without weights; first what needs no torch, for all of them.

    Raises:
        UserError: names the run.
    """
    configs = []
    for job in jobs:
        with _naming(job):
            configs.append(load_task(job.config, str(job.folder)))
    for job, config in zip(jobs, configs, strict=True):
        with _naming(job):
            check(config)
    return configs


@contextlib.contextmanager
def _naming(job: Job) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (in run {job.name}; nothing was started)" if job.swept else str(error)) from error


def _run(launcher, job: Job, place: int, total: int) -> JobReturn:
    say(f"[{place}/{total}] {job.name}")
    with swept_by(job.swept):
        returned = run_job(
            hydra_context=launcher.hydra_context,
            task_function=launcher.task_function,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    if returned.status is JobStatus.FAILED:
        say(f"[{place}/{total}] {job.name} failed: {one_line(returned._return_value)}")
        returned.return_value, returned.status = math.nan, JobStatus.COMPLETED
    return returned
