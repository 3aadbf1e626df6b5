"""Prepare the runs of a sweep before any of them starts: compose, name and check them, find those that exist already."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cruijff_kit.config.data_policy import check_access, withholds_samples
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.tiers import RED
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder, find_experiment_folder
from cruijff_kit.records.run_status import ACTIVE, RunState
from cruijff_kit.records.saved_config import load_saved_config
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
from cruijff_kit.runs.estimate import CostEstimate, check_budget, estimate_runs, summarise_estimates
from cruijff_kit.runs.plan import RunPlan, plan_run
from cruijff_kit.runs.run import settings_of
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states
from cruijff_kit.sweep.composer import Composer
from cruijff_kit.sweep.run_names import find_swept_keys, make_run_name, read_swept_values, select_differing
from cruijff_kit.sweep.task_config import load_task
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import make_private
from cruijff_kit.util.progress import progress, say


@dataclass
class SweepRun:
    """One run of a sweep, or a single run."""

    folder: Path
    swept: dict[str, Any]
    """The values that distinguish the run in its sweep."""
    composed: DictConfig
    """Config as Hydra composed it, with the ``hydra`` node."""
    config: RunConfig | None = None
    plan: RunPlan | None = None
    existing: Path | None = None
    """Folder of an identical run that is done or on its way."""
    existing_state: str | None = None
    estimate: CostEstimate | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.composed.run_name

    def continue_in(self, folder: Path) -> None:
        """Continue in the folder of an unfinished run with the same identity."""
        self.folder, self.config = folder, load_saved_config(folder, agent=self.config.agent)
        with open_dict(self.composed):
            self.composed.run_name = folder.name
            self.composed.resume_from_checkpoint = True
        if "hydra" in self.composed:
            with read_write(self.composed.hydra):
                self.composed.hydra.sweep.subdir = folder.name

    def identity(self) -> tuple[str, str | None]:
        """Return the key that identical runs share."""
        return run_identity(self.config, self.plan.data_hash)

    def to_entry(self, sweep_dir: Path) -> RunEntry:
        """Return the entry of the run in the sweep's manifest."""
        folder, sweep_dir = (self.existing or self.folder).absolute(), sweep_dir.absolute()
        return RunEntry(
            self.name,
            str(folder.relative_to(sweep_dir) if folder.is_relative_to(sweep_dir) else folder),
            *self.identity(),
            swept=self.swept,
            reused=self.existing is not None,
            settings=settings_of(self.config),
            estimate=asdict(self.estimate) if self.estimate else {},
        )


def prepare_single(config: RunConfig) -> SweepRun:
    """Check a single run and make a sweep of one of it.

    Raises:
        UserError: it cannot work.
    """
    return SweepRun(
        Path(config.output_dir), {}, OmegaConf.create({"run_name": config.run_name}), config, plan_run(config)
    )


def prepare(launcher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, sweep_dir: Path) -> list[SweepRun]:
    """Compose and check every run.

    Raises:
        UserError: a run that cannot work, by name; nothing was started.
    """
    runs = _compose(launcher, job_overrides, initial_job_idx, sweep_dir)
    for run in runs:
        with _naming_in_errors(run):
            HydraConfig.instance().set_config(run.composed)  # for what refers to ${hydra:...}
            run.config = load_task(run.composed, str(run.folder))
            check_access(run.config)
            if run.config.slurm.submit:
                run.composed = OmegaConf.create({"run_name": run.name})  # the rest is large, and saved in config.yaml
    with progress("checking", len(runs)) as bar:
        for run in runs:  # first all that needs no torch, then this
            with _naming_in_errors(run):
                run.plan = plan_run(run.config)
            bar.advance()
    return runs


@dataclass
class _ComposedRun:
    config: DictConfig
    swept: dict[str, Any]
    given_name: str | None
    """Name in run_name=NAME; None: the name shows what varies."""

    def shown_values(self, namesakes: Sequence["_ComposedRun"]) -> dict[str, Any]:
        """Return the values in its name: the given name and what varies among its namesakes; without one, what varies."""
        if self.swept and self.given_name is None:
            return self.swept
        return {"": self.config.run_name} | select_differing(self.swept, [other.swept for other in namesakes])


def _compose(launcher, job_overrides, initial_job_idx: int, sweep_dir: Path) -> list[SweepRun]:
    typed = OmegaConf.to_container(launcher.config.hydra.overrides.task)
    for_hydra = OmegaConf.to_container(launcher.config.hydra.overrides.hydra)
    has_subdir = any(o.startswith("hydra.sweep.subdir=") for o in for_hydra)
    keys = find_swept_keys(job_overrides, typed)
    composer = Composer(launcher.hydra_context.config_loader, launcher.config)
    composed = [_compose_run(composer, overrides, keys) for overrides in job_overrides]
    used_names = {p.name.lower() for p in sweep_dir.iterdir()} if sweep_dir.is_dir() else set()
    runs = []
    for number, run in enumerate(composed, initial_job_idx):
        config = run.config
        namesakes = [other for other in composed if other.given_name == run.given_name]
        name = make_run_name(run.shown_values(namesakes), used_names).lstrip("=")
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            config.run_name = name
            if not has_subdir:
                config.hydra.sweep.subdir = name
        if has_subdir:
            HydraConfig.instance().set_config(config)  # for a subdir that refers to ${hydra:...}
        runs.append(SweepRun(sweep_dir / str(config.hydra.sweep.subdir), run.swept, config))
    return runs


def _compose_run(composer: Composer, overrides: Sequence[str], keys: Sequence[str]) -> _ComposedRun:
    config = composer.compose(overrides)
    is_named = any(o.lstrip("+").startswith("run_name=") for o in overrides)
    return _ComposedRun(config, read_swept_values(config, keys, overrides), config.run_name if is_named else None)


@contextlib.contextmanager
def _naming_in_errors(run: SweepRun) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if not run.swept:
            raise
        raise UserError(f"{error} (in run {run.name}; nothing was started)", error.fix) from error


def find_existing(runs: list[SweepRun], sweep_dir: Path) -> None:
    """Mark the runs that the experiment's folder holds already, done or on their way; `force=true` marks none.

    The folders of the experiment are searched, or the sweep's own where it lies elsewhere. A run of this very sweep folder
    that is neither done nor active continues in its folder.
    """
    scope = find_experiment_folder(sweep_dir, runs[0].config.experiment.name) or sweep_dir.absolute()
    candidates_to_reuse = [run for run in runs if not run.config.force]
    if not scope.is_dir() or not candidates_to_reuse:
        return
    candidates = _find_identical(scope, {run.identity() for run in candidates_to_reuse})
    for run in candidates_to_reuse:
        for info in sorted(candidates.get(run.identity(), []), key=lambda v: v.state != RunState.DONE):
            folder = Path(info.folder)
            if _shows_samples(run, folder):
                continue
            # A finished run is done, even where its post-hoc evaluation failed.
            if info.state in (RunState.DONE, *ACTIVE) or is_done(folder):
                run.existing, run.existing_state = folder, info.state if info.state in ACTIVE else RunState.DONE
                json_output.append(existing=[{"name": info.name, "folder": str(folder), "state": run.existing_state}])
                break
            if folder.is_relative_to(sweep_dir.absolute()):
                run.continue_in(folder)
                break
    _report_existing([run for run in candidates_to_reuse if run.existing], len(runs))


def _shows_samples(run: SweepRun, folder: Path) -> bool:
    """Return whether an earlier run logged samples that this run must withhold, because its data was not red then."""
    path = folder / "result.json"
    return withholds_samples(run.config) and path.exists() and not read_result(path).redacted


def _find_identical(
    scope: Path, identities: set[tuple[str, str | None]]
) -> dict[tuple[str, str | None], list[RunInfo]]:
    """Find the runs with one of these identities in the manifests below a folder, with their state."""
    refs = {}
    for sweep_dir in find_sweep_manifests(scope):
        for entry in read_sweep_manifest(sweep_dir).runs:
            key = (entry.config_hash, entry.data_hash)
            if key in identities and not entry.reused:
                folder = resolve_folder(sweep_dir, entry)
                refs[folder] = (key, RunRef(folder, entry, sweep_dir))
    infos, _ = collect_states([ref for _, ref in refs.values()])
    by_identity: dict[tuple[str, str | None], list[RunInfo]] = {}
    for (key, _), info in zip(refs.values(), infos, strict=True):
        by_identity.setdefault(key, []).append(info)
    return by_identity


def _report_existing(runs: list[SweepRun], total: int) -> None:
    if not runs:
        return
    num_done = sum(run.existing_state == RunState.DONE for run in runs)
    parts = [f"{num_done} done"] * (num_done > 0) + [f"{len(runs) - num_done} queued or running"] * (
        num_done < len(runs)
    )
    sweeps = sorted({str(run.existing.parent) for run in runs})
    where = sweeps[0] if len(sweeps) == 1 else f"{len(sweeps)} sweeps"
    say(f"{len(runs)} of {total} runs exist already ({', '.join(parts)}) in {where}; force=true repeats them")


def estimate(runs: list[SweepRun], sweep_dir: Path) -> None:
    """Estimate what is to run, and print it.

    Raises:
        UserError: it is above max_gpu_hours, and nobody approved it.
    """
    new = [run for run in runs if run.existing is None]
    if not new:
        return
    of_new = estimate_runs([(run.config, run.plan) for run in new], sweep_dir)
    for run, one in zip(new, of_new, strict=True):
        run.estimate = one
    manifest = read_sweep_manifest(sweep_dir)
    folders = {run.folder.absolute() for run in new}
    earlier_entries = [e for e in manifest.runs if resolve_folder(sweep_dir, e) not in folders] if manifest else []
    check_budget(new[0].config, of_new, sum(e.estimate.get("gpu_hours", 0) for e in earlier_entries if not e.reused))
    say(summarise_estimates(of_new))


def save_manifest(runs: list[SweepRun], sweep_dir: Path, command: list[str]) -> None:
    """Save the configs of what is to run, and enter all runs into sweep.json; entries that it has stay as they are."""
    for run in runs:
        if run.existing is None:
            # Saved now, so that a run that the sweep never comes to can be resumed too.
            RunFolder(run.folder).freeze(replace(run.config, scaffold=False), run.swept)
    if any(run.config.dataset.tier == RED for run in runs):
        make_private(sweep_dir)
    with edit_sweep_manifest(sweep_dir, create_sweep_manifest(runs[0].config.experiment, command)) as manifest:
        folders = {resolve_folder(sweep_dir, e) for e in manifest.runs}
        entries = [run.to_entry(sweep_dir) for run in runs]
        manifest.runs += [e for e in entries if resolve_folder(sweep_dir, e) not in folders]
