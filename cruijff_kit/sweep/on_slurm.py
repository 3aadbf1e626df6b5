"""Submit the runs of a sweep to SLURM; with slurm.wait=true watch them until they have ended."""

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cruijff_kit.analysis.summary import write_summary
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import discard_unused
from cruijff_kit.records.run_status import RunState, read_status
from cruijff_kit.records.sweep_manifest import edit_sweep_manifest, is_done, read_sweep_manifest, resolve_folder
from cruijff_kit.sweep.finish import print_summary
from cruijff_kit.sweep.prepare import SweepRun, estimate, find_existing, prepare_single, save_manifest
from cruijff_kit.sweep.slurm_jobs import make_job_requests
from cruijff_kit.sweep.task_config import start_output
from cruijff_kit.sweep.wait import wait_for
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.slurm.submit import SubmitResult

# Files that a refused submission leaves in its folder.
_FILES_BEFORE_SUBMISSION = (
    "sweep.json",
    ".sweep.json.lock",
    "config.yaml",
    "swept.json",
    "status.json",
    "experiment_summary.md",
)


def submit_runs(runs: list[SweepRun], sweep_dir: Path) -> dict[int, float | None]:
    """Submit those of the runs that do not exist yet; with slurm.wait=true stay until all have ended.

    Args:
        runs: in the manifest of `sweep_dir`.
    Returns:
        The objectives of runs that are known to have ended, by the id() of the run.
    Raises:
        ClusterError: SLURM refused; what was submitted before is in the manifest, and what was made for the rest is gone.
    """
    from cruijff_kit.slurm.submit import submit

    new = [run for run in runs if run.existing is None]
    _warn_of_little_memory(new)
    result = None
    jobs = make_job_requests(
        [run.config for run in new], [run.folder.absolute() for run in new], [run.estimate for run in new]
    )
    if jobs:
        try:
            result = submit(jobs, sweep_dir, read_sweep_manifest(sweep_dir).cwd)
        except ClusterError:
            _discard(new, sweep_dir)
            raise
        print_submitted(result, sweep_dir)
    folders = {id(run): (run.existing or run.folder).absolute() for run in runs}
    if runs[0].config.slurm.wait:
        wait_for(sweep_dir, [*folders.values()])
    if result:
        reject_remaining(result, sweep_dir)
    return {key: _objective(folder) for key, folder in folders.items()} if runs[0].config.slurm.wait else {}


def _warn_of_little_memory(runs: list[SweepRun]) -> None:
    for run in runs:
        slurm, needed = run.config.slurm, run.plan.memory_bytes
        if slurm.mem_bytes is not None and not slurm.gpus and slurm.mem_bytes < needed:
            text = f"{needed / 1e9:.1f} GB"
            say(f"warning: slurm.mem={slurm.mem} is less than the estimated {text} of {run.name}")
            return  # one warning will do


def submit_single(config: RunConfig) -> None:
    """Submit a single run; write its manifest into its own folder.

    Raises:
        ClusterError: as submit_runs.
        SystemExit: with slurm.wait=true, with code 1 if the run failed.
    """
    run = prepare_single(config)
    find_existing([run], run.folder)
    folder = run.existing or run.folder
    start_output(folder)
    if run.existing is None:
        estimate([run], folder)
        save_manifest([run], folder, typed_arguments(OmegaConf.to_container(HydraConfig.get())))
        write_summary(folder)
    submit_runs([run], folder)
    if config.slurm.wait or run.existing_state == RunState.DONE:
        print_summary(folder)


def print_submitted(result: "SubmitResult", sweep_dir: Path) -> None:
    """Print what was submitted, and what to type next. (For --json, `submit` records it.)"""
    if json_output.is_enabled():
        return
    where = shlex.quote(os.path.relpath(sweep_dir))
    submitted = sum(len(a.runs) for a in result.arrays)
    print(f"{submitted} run{'s' * (submitted != 1)} submitted to SLURM{':' * bool(submitted)}")
    for array in result.arrays:
        print(f"  {array.summary()}")
    if result.arrays:
        print(f"watch:   cruijff-kit status {where} --watch")
        print(f"output:  cruijff-kit logs {where} RUN --follow")
        print(f"stop:    cruijff-kit cancel {where}")
        print(f"results: cruijff-kit table {where}", flush=True)


def reject_remaining(result: "SubmitResult", sweep_dir: Path) -> None:
    """Raises ClusterError if there are runs that did not fit into the queue."""
    if num_runs := len(result.remaining_runs):
        raise ClusterError(
            f"{num_runs} run{'s do' if num_runs > 1 else ' does'} not fit into the queue now (sbatch: "
            f"{result.refusal}); submit the rest later: cruijff-kit resume {shlex.quote(os.path.relpath(sweep_dir))}"
        )


def _objective(run: Path) -> float | None:
    return read_result(run / "result.json").objective if is_done(run) else None


def _discard(runs: list[SweepRun], sweep_dir: Path) -> None:
    """Remove the folders and entries of runs that were not submitted; keep a run that has started before."""
    with edit_sweep_manifest(sweep_dir) as manifest:
        submitted = {resolve_folder(sweep_dir, e) for e in manifest.runs if e.submissions}
        unused = {run.folder.absolute() for run in runs} - submitted
        unused = {f for f in unused if (status := read_status(f)) is None or not (status.started or status.history)}
        manifest.runs = [e for e in manifest.runs if resolve_folder(sweep_dir, e) not in unused]
        is_empty = not manifest.runs
    for folder in unused - {sweep_dir.absolute()}:
        shutil.rmtree(folder, ignore_errors=True)
    if is_empty:
        for name in _FILES_BEFORE_SUBMISSION:
            (sweep_dir / name).unlink(missing_ok=True)
        shutil.rmtree(sweep_dir / ".submitit", ignore_errors=True)
        discard_unused(sweep_dir)
