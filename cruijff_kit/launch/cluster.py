"""Runs of a sweep on SLURM: frozen, submitted, named; and with slurm.wait=true watched until they have ended."""

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cruijff_kit import answer
from cruijff_kit.cluster.client import ClusterError
from cruijff_kit.cluster.request import sbatch_options
from cruijff_kit.config import RunConfig
from cruijff_kit.estimate import Estimate, clock
from cruijff_kit.folder import discard_unused
from cruijff_kit.launch.jobs import Job, estimate, find_earlier, write_down
from cruijff_kit.launch.task import begin_answer
from cruijff_kit.launch.typed import typed_arguments
from cruijff_kit.ledger import editing, is_done, read_ledger, run_folder
from cruijff_kit.packs import packs_of
from cruijff_kit.plan import check
from cruijff_kit.progress import say
from cruijff_kit.result import read_result
from cruijff_kit.run_status import DONE, read_status
from cruijff_kit.summary import write_summary

if TYPE_CHECKING:
    from cruijff_kit.cluster.submit import Outcome, Submission

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
    from cruijff_kit.cluster.submit import submit

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
        from cruijff_kit.launch.wait import wait_for

        wait_for(sweep_dir, [*folders.values()])
    if runs:
        refuse_rest(outcome, sweep_dir)
    return {key: _objective(folder) for key, folder in folders.items()} if jobs[0].config.slurm.wait else {}


def submissions(configs: list[RunConfig], folders: list[Path], expected: list[Estimate | None]) -> "list[Submission]":
    """The jobs that runs make: those of a pack are one."""
    from cruijff_kit.cluster.submit import Submission

    seconds = [e.seconds if e else 0.0 for e in expected]
    jobs = []
    for pack in packs_of(configs, seconds):
        first, config = folders[pack.runs[0]], configs[pack.runs[0]]
        jobs.append(Submission(first, sbatch_options(config), config.slurm.max_parallel))
        if len(pack.runs) > 1:
            jobs[-1].together, jobs[-1].at_once = [folders[n] for n in pack.runs], pack.at_once or 0
            _warn_of_little_time([configs[n] for n in pack.runs], sum(seconds[n] for n in pack.runs))
    return jobs


def _warn_of_little_time(pack: list[RunConfig], seconds: float) -> None:
    limit = pack[0].slurm.time_seconds
    if limit is not None and seconds > limit:
        say(
            f"warning: {len(pack)} runs share a job of slurm.time={pack[0].slurm.time} and take {clock(seconds)} one after "
            "another by the estimate; at its end they go back into the queue and go on from there"
        )


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
        from cruijff_kit.launch.callback import show_end

        show_end(job.earlier or folder)


def report(outcome: "Outcome", sweep_dir: Path) -> None:
    """Say what was submitted, and what to type next. (A program is told by the submission itself.)"""
    if answer.wanted():
        return
    where = shlex.quote(os.path.relpath(sweep_dir))
    submitted = sum(a.size for a in outcome.arrays)
    print(f"{submitted} run{'s' * (submitted != 1)} submitted to SLURM{':' * bool(submitted)}")
    for array in outcome.arrays:
        print(f"  {array.what}")
    if outcome.arrays:
        print(f"watch:   python -m cruijff_kit.status {where} --watch")
        print(f"output:  python -m cruijff_kit.logs {where} RUN --follow")
        print(f"stop:    python -m cruijff_kit.cancel {where}")
        print(f"results: python -m cruijff_kit.table {where}", flush=True)


def refuse_rest(outcome: "Outcome", sweep_dir: Path) -> None:
    """Raises ClusterError if there are runs that did not fit into the queue."""
    if outcome.left:
        raise ClusterError(
            f"{len(outcome.left)} run{'s do' if len(outcome.left) > 1 else ' does'} not fit into the queue now (sbatch: "
            f"{outcome.why}); submit the rest later: python -m cruijff_kit.resume {shlex.quote(os.path.relpath(sweep_dir))}"
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
