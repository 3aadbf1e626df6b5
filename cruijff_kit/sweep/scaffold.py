"""scaffold=true: everything is checked, the folders are made, nothing is started; `resume` starts it."""

import os
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cruijff_kit.analysis.summary import NAME, write_summary
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.config.run import RunConfig
from cruijff_kit.runs.plan import check
from cruijff_kit.sweep.dry_run import planned_arrays
from cruijff_kit.sweep.prepare import SweepRun, estimate, find_existing, save_manifest
from cruijff_kit.sweep.task_config import start_output
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say


def scaffold_alone(config: RunConfig) -> None:
    """A single run; its manifest lies in its own folder."""
    folder = Path(config.output_dir)
    job = SweepRun(folder, {}, OmegaConf.create({"run_name": config.run_name}), config, check(config))
    find_existing([job], folder)
    if job.existing is None:
        estimate([job], folder)
        check_arrays([job], folder)
        save_manifest([job], folder, typed_arguments(OmegaConf.to_container(HydraConfig.get())))
        write_summary(folder)
    print_scaffold([job], folder)


def check_arrays(jobs: list[SweepRun], sweep_dir: Path) -> None:
    """Ask SLURM whether it would take what is to be submitted.

    Raises:
        ClusterError: it would not, or does not answer.
    """
    new = [job for job in jobs if job.existing is None and job.config.slurm.submit]
    for array in planned_arrays([j.config for j in new], sweep_dir.absolute(), [j.estimate for j in new]):
        if array.error is not None:
            raise array.error


def print_scaffold(jobs: list[SweepRun], sweep_dir: Path) -> None:
    """Say what was made, and what to type next."""
    new = sum(job.existing is None for job in jobs)
    where = os.path.relpath(sweep_dir)
    start_output(sweep_dir)
    json_output.extend(
        planned=[{"name": j.name, "folder": str(j.folder.absolute())} for j in jobs if j.existing is None]
    )
    if new:
        print(f"{new} run{'s' * (new != 1)} checked and planned in {where}; read {Path(where, NAME)}")
        print(f"start:   cruijff-kit resume {shlex.quote(where)}", flush=True)
    else:
        say("nothing is left to do: every run exists already")
