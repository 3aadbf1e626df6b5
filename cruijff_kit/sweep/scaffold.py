"""scaffold=true: check everything and make the folders, but start nothing; `resume` starts it."""

import os
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cruijff_kit.analysis.summary import NAME, write_summary
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.config.run import RunConfig
from cruijff_kit.sweep.dry_run import planned_arrays
from cruijff_kit.sweep.prepare import SweepRun, estimate, find_existing, prepare_single, save_manifest
from cruijff_kit.sweep.task_config import start_output
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say


def scaffold_single(config: RunConfig) -> None:
    """Scaffold a single run; write its manifest into its own folder."""
    run = prepare_single(config)
    find_existing([run], run.folder)
    if run.existing is None:
        estimate([run], run.folder)
        check_arrays([run], run.folder)
        save_manifest([run], run.folder, typed_arguments(OmegaConf.to_container(HydraConfig.get())))
        write_summary(run.folder)
    print_scaffold([run], Path(config.output_dir))


def check_arrays(runs: list[SweepRun], sweep_dir: Path) -> None:
    """Ask SLURM whether it would take what is to be submitted.

    Raises:
        ClusterError: it would not, or does not answer.
    """
    new = [run for run in runs if run.existing is None and run.config.slurm.submit]
    arrays = planned_arrays([run.config for run in new], sweep_dir.absolute(), [run.estimate for run in new])
    for array in arrays:
        if array.error is not None:
            raise array.error


def print_scaffold(runs: list[SweepRun], sweep_dir: Path) -> None:
    """Print the folders and the next commands."""
    new = [run for run in runs if run.existing is None]
    where = os.path.relpath(sweep_dir)
    start_output(sweep_dir)
    json_output.append(planned=[{"name": run.name, "folder": str(run.folder.absolute())} for run in new])
    if new:
        print(f"{len(new)} run{'s' * (len(new) != 1)} checked and planned in {where}; read {Path(where, NAME)}")
        print(f"start:   cruijff-kit resume {shlex.quote(where)}", flush=True)
    else:
        say("nothing is left to do: every run exists already")
