"""Plan what archiving a folder keeps and deletes, before anything is touched."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from cruijff_kit.analysis.sweep import analyse
from cruijff_kit.records.archive_manifest import NAME
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.records.run_folder import parse_epoch
from cruijff_kit.records.run_status import ACTIVE, RunState
from cruijff_kit.runs.ro_crate import NAME as CRATE
from cruijff_kit.slurm.run_states import RunRef, collect_states, find_runs
from cruijff_kit.util.errors import ClusterError, UserError

BEST, ALL, NONE = "best", "all", "none"
_HEAVY = ("merged", "checkpoint")


@dataclass
class ArchivePlan:
    """Files to keep and folders to delete below `root`; paths are relative to it."""

    root: Path
    runs: list[Path]
    best: list[Path] = field(default_factory=list)
    """Runs of the best configuration, one per seed."""
    files: dict[Path, int] = field(default_factory=dict)
    """path -> bytes, of the files to keep (and to copy)."""
    delete: dict[Path, int] = field(default_factory=dict)
    """folder -> bytes, of the folders to delete."""
    adapters: list[Path] = field(default_factory=list)
    """Adapters that are kept."""
    links: list[Path] = field(default_factory=list)
    """Symbolic links, which are left alone."""

    @property
    def freed(self) -> int:
        """Bytes that deleting gives back."""
        return sum(self.delete.values())


def plan_archive(root: Path, keep: str) -> ArchivePlan:
    """Plan what archiving a folder keeps and deletes.

    Raises:
        UserError: it holds no runs, or one that is not finished; or the best run is unknown.
    """
    known = find_runs(root)
    refuse_unfinished(known, root)
    own = [k.folder for k in known if k.folder.is_dir() and k.folder.is_relative_to(root)]
    plan = ArchivePlan(root, own)
    plan.best = _find_best(own, keep)
    for run in own:
        for path in sorted(run.iterdir()):
            if path.is_symlink() or not path.is_dir():
                continue
            if parse_epoch(path.name) is not None or path.name in _HEAVY:
                plan.delete[path.relative_to(root)] = _count_bytes(path)
    plan.adapters = [p for p in plan.delete if parse_epoch(p.name) is not None and _is_kept(p, plan, keep)]
    for path in plan.adapters:
        del plan.delete[path]
    _find_kept_files(plan)
    return plan


def _is_kept(adapter: Path, plan: ArchivePlan, keep: str) -> bool:
    run = next((b for b in plan.best if (plan.root / adapter).parent == b), None)
    if keep != BEST or run is None:
        return keep == ALL
    run = run.relative_to(plan.root)
    epochs = [n for p in plan.delete if p.parent == run and (n := parse_epoch(p.name)) is not None]
    return bool(epochs) and adapter == run / f"epoch_{max(epochs)}"


def _find_best(runs: list[Path], keep: str) -> list[Path]:
    """Return the runs of the best configuration; a single configuration is the best."""
    if keep != BEST:
        return []
    results = {run: read_result(run / "result.json") for run in runs if (run / "result.json").is_file()}
    finished_results: dict[Path, RunResult] = {run: r for run, r in results.items() if r.status == "done"}
    analysis = analyse([*finished_results.values()])
    best = analysis.ranking.leader if analysis.ranking else None
    if best is None and len(analysis.configurations) == 1:
        (best,) = analysis.configurations
    if best is None:
        why = "they have no objective, or not the same one" if finished_results else "no run is done"
        raise UserError(f"the best run is unknown ({why}); add --keep all or --keep none")
    return [run for run, result in finished_results.items() if any(result is r for r in best.runs)]


def refuse_unfinished(known: list[RunRef], root: Path) -> None:
    """Raise UserError for a run below `root` that is neither done nor failed, ClusterError if that is unknown."""
    infos, trouble = collect_states(known)
    pairs = [(k, v) for k, v in zip(known, infos, strict=True) if k.folder.is_dir() and k.folder.is_relative_to(root)]
    if not pairs:
        raise UserError(f"{root} is not a run or a sweep; give a run's or a sweep's folder")
    if trouble and any(v.state in ACTIVE and v.job_id for _, v in pairs):
        raise ClusterError(trouble)
    for k, info in pairs:
        if (k.folder / "evaluate.json").exists():
            raise UserError(f"{info.name} waits for an evaluation; finish it first: cruijff-kit resume {k.folder}")
        if info.state not in (RunState.DONE, RunState.FAILED):
            how = "status" if info.state in ACTIVE else "resume"
            raise UserError(
                f"{info.name} is {info.state}, and only done or failed runs can be archived; cruijff-kit {how} {root}"
            )
        if (k.folder / "result.json").is_file():
            read_result(k.folder / "result.json")
        elif info.state == RunState.DONE:
            raise UserError(f"{k.folder} is done but has no result.json; put it back before archiving")


def _find_kept_files(plan: ArchivePlan) -> None:
    """Find every file that is kept; symbolic links are not followed."""
    for place, below, files in os.walk(plan.root):
        parent = Path(place)
        for name in sorted([*below, *files]):
            path = parent / name
            if path.is_symlink():
                plan.links.append(path.relative_to(plan.root))
            elif name in files and not name.endswith(".lock") and path not in (plan.root / NAME, plan.root / CRATE):
                plan.files[path.relative_to(plan.root)] = path.stat().st_size
        below[:] = [b for b in below if (parent / b).relative_to(plan.root) not in plan.delete]


def _count_bytes(folder: Path) -> int:
    return sum(f.lstat().st_size for place, _, names in os.walk(folder) for f in (Path(place) / n for n in names))
