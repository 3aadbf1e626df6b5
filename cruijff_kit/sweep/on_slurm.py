"""Runs of a sweep on SLURM: frozen, submitted, named; and with slurm.wait=true watched until they have ended."""

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
from cruijff_kit.records.run_status import DONE, read_status
from cruijff_kit.records.sweep_manifest import editing, is_done, read_ledger, run_folder
from cruijff_kit.runs.plan import check
from cruijff_kit.sweep.finish import show_end
from cruijff_kit.sweep.prepare import Job, estimate, find_earlier, write_down
from cruijff_kit.sweep.slurm_jobs import submissions
from cruijff_kit.sweep.task_config import begin_answer
from cruijff_kit.sweep.wait import wait_for
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.slurm.submit import Outcome

# What a submission that came to nothing leaves in its folder.
_MADE = (
    "sweep.json",
    ".sweep.json.lock",
    "config.yaml",
    "swept.json",
    "status.json",
    "experiment_summary.md",
)


def submit_jobs(jobs: list[Job], sweep_dir: Path) -> dict[int, float | None]:
    """Submit those of the jobs that do not exist yet; with slurm.wait=true stay until all have ended.

    Args:
        jobs: in the ledger of `sweep_dir`.
    Returns:
        The objectives of runs that are known to have ended, by id of the job.
    Raises:
        ClusterError: SLURM refused; what was submitted before is in the ledger, and what was made for the rest is gone.
    """
    from cruijff_kit.slurm.submit import submit

    new = [j for j in jobs if j.earlier is None]
    _warn_of_little_memory(new)
    runs = submissions([j.config for j in new], [j.folder.absolute() for j in new], [j.estimate for j in new])
    if runs:
        try:
            outcome = submit(runs, sweep_dir, read_ledger(sweep_dir).cwd)
        except ClusterError:
            _discard(new, sweep_dir)
            raise
        report(outcome, sweep_dir)
    folders = {id(j): (j.earlier or j.folder).absolute() for j in jobs}
    if jobs[0].config.slurm.wait:
        wait_for(sweep_dir, [*folders.values()])
    if runs:
        refuse_rest(outcome, sweep_dir)
    return {key: _objective(folder) for key, folder in folders.items()} if jobs[0].config.slurm.wait else {}


def _warn_of_little_memory(jobs: list[Job]) -> None:
    for job in jobs:
        asked = job.config.slurm.mem_bytes
        if asked is not None and not job.config.slurm.gpus and asked < job.plan.memory_bytes:
            needs = f"{job.plan.memory_bytes / 1e9:.1f} GB"
            say(f"warning: slurm.mem={job.config.slurm.mem} is less than the estimated {needs} of {job.name}")
            return  # one says it


def submit_alone(config: RunConfig) -> None:
    """Submit a single run; its ledger lies in its own folder.

    Raises:
        ClusterError: as submit_jobs.
        SystemExit: with slurm.wait=true, with code 1 if the run failed.
    """
    folder = Path(config.output_dir)
    job = Job(folder, {}, OmegaConf.create({"run_name": config.run_name}), config, check(config))
    find_earlier([job], folder)
    begin_answer(job.earlier or folder)
    if job.earlier is None:
        estimate([job], folder)
        write_down([job], folder, typed_arguments(OmegaConf.to_container(HydraConfig.get())))
        write_summary(folder)
    submit_jobs([job], job.earlier or folder)
    if config.slurm.wait or job.earlier_state == DONE:
        show_end(job.earlier or folder)


def report(outcome: "Outcome", sweep_dir: Path) -> None:
    """Say what was submitted, and what to type next. (A program is told by the submission itself.)"""
    if json_output.wanted():
        return
    where = shlex.quote(os.path.relpath(sweep_dir))
    submitted = sum(a.size for a in outcome.arrays)
    print(f"{submitted} run{'s' * (submitted != 1)} submitted to SLURM{':' * bool(submitted)}")
    for array in outcome.arrays:
        print(f"  {array.what}")
    if outcome.arrays:
        print(f"watch:   cruijff-kit status {where} --watch")
        print(f"output:  cruijff-kit logs {where} RUN --follow")
        print(f"stop:    cruijff-kit cancel {where}")
        print(f"results: cruijff-kit table {where}", flush=True)


def refuse_rest(outcome: "Outcome", sweep_dir: Path) -> None:
    """Raises ClusterError if there are runs that did not fit into the queue."""
    if outcome.left:
        raise ClusterError(
            f"{len(outcome.left)} run{'s do' if len(outcome.left) > 1 else ' does'} not fit into the queue now (sbatch: "
            f"{outcome.why}); submit the rest later: cruijff-kit resume {shlex.quote(os.path.relpath(sweep_dir))}"
        )


def _objective(run: Path) -> float | None:
    return read_result(run / "result.json").objective if is_done(run) else None


def _discard(jobs: list[Job], sweep_dir: Path) -> None:
    """Remove what was made for runs of which none was submitted; a run that has been somewhere before is kept."""
    with editing(sweep_dir) as ledger:
        submitted = {run_folder(sweep_dir, e) for e in ledger.runs if e.attempts}
        gone = {j.folder.absolute() for j in jobs} - submitted
        gone = {f for f in gone if (status := read_status(f)) is None or not (status.started or status.history)}
        ledger.runs = [e for e in ledger.runs if run_folder(sweep_dir, e) not in gone]
        empty = not ledger.runs
    for folder in gone - {sweep_dir.absolute()}:
        shutil.rmtree(folder, ignore_errors=True)
    if empty:
        for name in _MADE:
            (sweep_dir / name).unlink(missing_ok=True)
        shutil.rmtree(sweep_dir / ".submitit", ignore_errors=True)
        discard_unused(sweep_dir)
