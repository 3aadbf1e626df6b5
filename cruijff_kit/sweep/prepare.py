"""The runs of a sweep before any of them starts: composed, named, typed, checked, and those that exist already found."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cruijff_kit.config.data_policy import admit, withholds_samples
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.tiers import RED
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import ACTIVE, DONE
from cruijff_kit.records.saved_config import frozen
from cruijff_kit.records.sweep_manifest import (
    RunEntry,
    create_sweep_manifest,
    edit_sweep_manifest,
    find_sweep_manifests,
    is_done,
    read_sweep_manifest,
    resolve_folder,
    run_identity,
)
from cruijff_kit.runs.estimate import Estimate, check_budget, estimates, in_words
from cruijff_kit.runs.plan import Plan, check
from cruijff_kit.runs.run import settings_of
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states
from cruijff_kit.sweep.composer import Composer
from cruijff_kit.sweep.run_names import differing, run_name, swept_keys, swept_values
from cruijff_kit.sweep.task_config import load_task
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import close_folder
from cruijff_kit.util.progress import progress, say


@dataclass
class SweepRun:
    """One run of the sweep.

    composed: as Hydra composed it, with the ``hydra`` node. config: typed. plan: what the checks came to. earlier: the
    folder of an identical run that is done or on its way, if there is one. estimate: of what is to run.
    """

    folder: Path
    swept: dict[str, Any]
    composed: DictConfig
    config: RunConfig | None = None
    plan: Plan | None = None
    existing: Path | None = None
    existing_state: str | None = None
    estimate: Estimate | None = None

    @property
    def name(self) -> str:
        """The name that the run goes by."""
        return self.composed.run_name

    def move(self, folder: Path) -> None:
        """Go on in the folder of an unfinished run that this one repeats."""
        self.folder, self.config = folder, frozen(folder)
        with open_dict(self.composed):
            self.composed.run_name = folder.name
            self.composed.resume_from_checkpoint = True
        if "hydra" in self.composed:
            with read_write(self.composed.hydra):
                self.composed.hydra.sweep.subdir = folder.name

    def entry(self, sweep_dir: Path) -> RunEntry:
        """The run in the manifest."""
        place = self.existing or self.folder
        inside = place.absolute().is_relative_to(sweep_dir.absolute())
        folder = str(place.absolute().relative_to(sweep_dir.absolute())) if inside else str(place.absolute())
        hashes = run_identity(self.config, self.plan.data_hash)
        return RunEntry(
            self.name,
            folder,
            *hashes,
            swept=self.swept,
            reused=self.existing is not None,
            settings=settings_of(self.config),
            estimate=asdict(self.estimate) if self.estimate else {},
        )


def prepare(launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, sweep_dir: Path) -> list[SweepRun]:
    """Compose and check every run.

    Raises:
        UserError: a run that cannot work, by name; nothing was started.
    """
    jobs = _compose(launcher, job_overrides, initial_job_idx, sweep_dir)
    for job in jobs:
        with _naming(job):
            HydraConfig.instance().set_config(job.composed)  # for what refers to ${hydra:...}
            job.config = load_task(job.composed, str(job.folder))
            admit(job.config)
            if job.config.slurm.submit:
                job.composed = OmegaConf.create({"run_name": job.name})  # the rest is large, and frozen in config.yaml
    with progress("checking", len(jobs)) as bar:
        for job in jobs:  # first all that needs no torch, then this
            with _naming(job):
                job.plan = check(job.config)
            bar.advance()
    return jobs


def _compose(launcher, job_overrides, initial_job_idx: int, sweep_dir: Path) -> list[SweepRun]:
    typed = OmegaConf.to_container(launcher.config.hydra.overrides.task)
    for_hydra = OmegaConf.to_container(launcher.config.hydra.overrides.hydra)
    keys = swept_keys(job_overrides, typed)
    chosen_by_user = any(o.startswith("hydra.sweep.subdir=") for o in for_hydra)
    taken = {p.name.lower() for p in sweep_dir.iterdir()} if sweep_dir.is_dir() else set()
    composer = Composer(launcher.hydra_context.config_loader, launcher.config)
    configs = [composer.compose(overrides) for overrides in job_overrides]
    sweeps = [swept_values(config, keys, overrides) for config, overrides in zip(configs, job_overrides, strict=True)]
    given = [
        config.run_name if any(o.lstrip("+").startswith("run_name=") for o in overrides) else None
        for config, overrides in zip(configs, job_overrides, strict=True)
    ]
    jobs = []
    for number, (config, swept, name) in enumerate(zip(configs, sweeps, given, strict=True)):
        namesakes = [values for values, other in zip(sweeps, given, strict=True) if other == name]
        shown = {"": config.run_name} | differing(swept, namesakes) if name is not None or not swept else swept
        name = run_name(shown, taken).lstrip("=")
        number += initial_job_idx
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.run_name = name
            if not chosen_by_user:
                config.hydra.sweep.subdir = name
        if chosen_by_user:
            HydraConfig.instance().set_config(config)  # for a subdir that refers to ${hydra:...}
        jobs.append(SweepRun(sweep_dir / str(config.hydra.sweep.subdir), swept, config))
    return jobs


@contextlib.contextmanager
def _naming(job: SweepRun) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if not job.swept:
            raise
        raise UserError(f"{error} (in run {job.name}; nothing was started)", error.fix) from error


def find_existing(jobs: list[SweepRun], sweep_dir: Path) -> None:
    """Mark the jobs that the experiment's folder holds already, done or on their way; `force=true` marks none.

    The experiment's folder is the one above the sweep's (or two above a single run's) if it bears the experiment's name,
    else the sweep's own. A run of this very sweep folder that is neither done nor on its way goes on where it lies.
    """
    scope = sweep_dir.absolute()
    above = [p for p in list(scope.parents)[:2] if p.name == jobs[0].config.experiment.name]
    scope = above[0] if above else scope
    wanted = [j for j in jobs if not j.config.force]
    if not scope.is_dir() or not wanted:
        return
    same = _same_runs(scope, {run_identity(j.config, j.plan.data_hash) for j in wanted})
    for job in wanted:
        for info in sorted(same.get(run_identity(job.config, job.plan.data_hash), []), key=lambda v: v.state != DONE):
            folder = Path(info.folder)
            if _shows_samples(job, folder):
                continue
            if info.state in (DONE, *ACTIVE) or is_done(folder):  # or only a post-hoc evaluation did not end well
                job.existing, job.existing_state = folder, info.state if info.state in ACTIVE else DONE
                json_output.extend(existing=[{"name": info.name, "folder": str(folder), "state": job.existing_state}])
                break
            if folder.is_relative_to(sweep_dir.absolute()):
                job.move(folder)
                break
    _report_existing([j for j in wanted if j.existing], len(jobs))


def _shows_samples(job: SweepRun, folder: Path) -> bool:
    """Whether a run was made when its data was not red yet: its logs hold what this one's must not."""
    path = folder / "result.json"
    return withholds_samples(job.config) and path.exists() and not read_result(path).redacted


def _same_runs(scope: Path, identities: set[tuple[str, str | None]]) -> dict[tuple[str, str | None], list[RunInfo]]:
    """The runs in the manifests below a folder that have one of these identities, with their state."""
    found = {}
    for sweep_dir in find_sweep_manifests(scope):
        for entry in read_sweep_manifest(sweep_dir).runs:
            key = (entry.config_hash, entry.data_hash)
            if key in identities and not entry.reused:
                found[resolve_folder(sweep_dir, entry)] = (
                    key,
                    RunRef(resolve_folder(sweep_dir, entry), entry, sweep_dir),
                )
    infos, _ = collect_states([known for _, known in found.values()])
    by_identity: dict[tuple[str, str | None], list[RunInfo]] = {}
    for (key, _), info in zip(found.values(), infos, strict=True):
        by_identity.setdefault(key, []).append(info)
    return by_identity


def _report_existing(found: list[SweepRun], total: int) -> None:
    if not found:
        return
    done = sum(j.existing_state == DONE for j in found)
    parts = [f"{done} done"] * (done > 0) + [f"{len(found) - done} queued or running"] * (done < len(found))
    where = sorted({str(j.existing.parent) for j in found})
    place = where[0] if len(where) == 1 else f"{len(where)} sweeps"
    say(f"{len(found)} of {total} runs exist already ({', '.join(parts)}) in {place}; force=true runs them again")


def estimate(jobs: list[SweepRun], sweep_dir: Path) -> None:
    """Estimate what is to run, and say it.

    Raises:
        UserError: it is above max_gpu_hours, and nobody approved it.
    """
    new = [job for job in jobs if job.existing is None]
    if not new:
        return
    found = estimates([(job.config, job.plan) for job in new], sweep_dir)
    for job, one in zip(new, found, strict=True):
        job.estimate = one
    manifest = read_sweep_manifest(sweep_dir)
    folders = {job.folder.absolute() for job in new}
    others = [e for e in manifest.runs if resolve_folder(sweep_dir, e) not in folders] if manifest else []
    check_budget(new[0].config, found, sum(e.estimate.get("gpu_hours", 0) for e in others if not e.reused))
    say(in_words(found))


def save_manifest(jobs: list[SweepRun], sweep_dir: Path, command: list[str]) -> None:
    """Freeze what is to run, and enter all jobs into the sweep's manifest; a run that it has already stays as it is."""
    for job in jobs:
        if job.existing is None:
            # Frozen, so that a run that the sweep never comes to can be resumed too.
            RunFolder(job.folder).freeze(replace(job.config, scaffold=False), job.swept)
    if any(job.config.dataset.tier == RED for job in jobs):
        close_folder(sweep_dir)
    with edit_sweep_manifest(sweep_dir, create_sweep_manifest(jobs[0].config.experiment, command)) as manifest:
        folders = {resolve_folder(sweep_dir, e) for e in manifest.runs}
        manifest.runs += [
            e for e in (job.entry(sweep_dir) for job in jobs) if resolve_folder(sweep_dir, e) not in folders
        ]
