"""Archive a finished experiment, and delete the adapters that are not kept:

    cruijff-kit archive DIR [--to DIR2 [--data]] [--keep best|all|none] [--license TEXT]

Adapters (epoch_N), merged models and checkpoints are deleted, but for the adapters that are kept: of the best
configuration the last ones (--keep best). All else stays in DIR; with --to it is copied to DIR2 first, kept adapters too,
and each copy is compared with what it was made of before anything is deleted. archive.json says what is there, with hashes,
and what is gone; ro-crate-metadata.json describes it for repositories (ro_crate.py). --data copies the data too
(archive_data.py).
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.data.tiers import write_tier
from cruijff_kit.records.archive_manifest import (
    DELETING,
    DONE,
    NAME,
    ArchiveManifest,
    DeletedFolder,
    read_manifest,
    write_manifest,
)
from cruijff_kit.runs.archive_data import FOLDER as DATA
from cruijff_kit.runs.archive_data import DataCopy, plan_data_copies
from cruijff_kit.runs.archive_plan import ALL, BEST, EPOCH, NONE, ArchivePlan, plan_archive, refuse_unfinished
from cruijff_kit.runs.ro_crate import NAME as CRATE
from cruijff_kit.runs.ro_crate import read_runs, write_crate
from cruijff_kit.slurm.run_states import find_runs
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import atomic, hash_file
from cruijff_kit.util.format import format_size
from cruijff_kit.util.progress import progress


def archive(
    folder: Path, to: Path | None, keep: str, dry_run: bool, sure: bool, data: bool = False, license: str | None = None
) -> dict[str, Any]:
    """Copy, verify, delete; returns what --json prints.

    Raises:
        UserError: a run that is not finished, a target that cannot be, data that must not or cannot be copied, or nobody
            who could say yes. Nothing was deleted.
        ClusterError: whether a run is active cannot be told.
    """
    root = _require_folder(folder)
    target = None if to is None else _check_target(root, to)
    if data and target is None:
        raise UserError("--data copies the data to the archive; name it: --to DIR2")
    plan = plan_archive(root, keep)
    copies = plan_data_copies(plan.runs) if data else []
    _show(plan, target, dry_run, copies)
    report = _report(plan, target, dry_run, copies)
    if dry_run:
        return report
    if plan.delete and not sure and not _confirm(plan):
        print("nothing was copied or deleted")
        return report | {"deleted": [], "freed_bytes": 0, "copied_files": 0, "data": [], "crate": None}
    manifest, results = _make_manifest(plan, keep), read_runs(root, plan.runs)
    if target is not None:
        before = read_manifest(target)
        manifest.data = before.data if before else []
        manifest.data = [d for d in manifest.data if d.hash not in {c.hash for c in copies}]
        manifest.data += [c.to_manifest() for c in copies]
        write_manifest(manifest, target)
        hashes = {path: known["sha256"] for path, known in manifest.files.items()}
        _copy({root / path: path for path in hashes}, target, hashes)
        for copy, written in zip(copies, manifest.data[len(manifest.data) - len(copies) :], strict=True):
            _copy(copy.files, target, {path: known["sha256"] for path, known in written.files.items()})
            write_tier(target / DATA / copy.hash, copy.tier)
    manifest.state = DELETING
    write_manifest(manifest, root)
    refuse_unfinished(find_runs(root), root)  # one may have begun to go on meanwhile
    for path in plan.delete:
        shutil.rmtree(root / path)
    manifest.state = DONE
    for place in (root, target):
        if place is not None:
            write_manifest(manifest, place)
            write_crate(place, manifest, results, license)
    print(f"{format_size(plan.freed)} freed; {root / NAME} says what was deleted")
    return report


def _make_manifest(plan: ArchivePlan, keep: str) -> ArchiveManifest:
    before = read_manifest(plan.root)
    best = [run.relative_to(plan.root).as_posix() for run in plan.best]
    manifest = ArchiveManifest(str(plan.root), keep, best, links=[p.as_posix() for p in plan.links])
    gone = {d.path: d for d in (before.deleted if before else [])}
    with progress("hashing", len(plan.files) + len(plan.delete)) as bar:
        for path, length in plan.files.items():
            manifest.files[path.as_posix()] = {"sha256": hash_file(plan.root / path), "bytes": length}
            bar.advance()
        for path, length in plan.delete.items():
            files = _hash_files(plan.root / path) if EPOCH.fullmatch(path.name) else {}
            known = gone.get(path.as_posix())  # cut short: what was hashed before it was half deleted
            gone[path.as_posix()] = (
                known if known and len(known.files) > len(files) else DeletedFolder(path.as_posix(), length, files)
            )
            bar.advance()
    here = {p.as_posix() for p in plan.adapters}
    manifest.deleted = [d for d in gone.values() if d.path not in here]  # put back since
    return manifest


def _hash_files(folder: Path) -> dict[str, str]:
    return {f.name: hash_file(f) for f in sorted(folder.iterdir()) if f.is_file() and not f.is_symlink()}


def _copy(files: dict[Path, str], target: Path, hashes: dict[str, str]) -> None:
    """Copy what is kept and compare every copy; what is there already and the same is left.

    Args:
        files: what is copied -> its path below the target. hashes: path -> sha256.
    Raises:
        OSError: a copy could not be made, or is not what it was made of.
    """
    with progress("copying", len(files)) as bar:
        for file, path in files.items():
            copy = target / path
            if not copy.is_file() or hash_file(copy) != hashes[str(path)]:
                with atomic(copy) as draft:
                    shutil.copy2(file, draft)
            bar.advance()
    with progress("comparing", len(files)) as bar:
        for path in files.values():
            if hash_file(target / path) != hashes[str(path)]:
                raise OSError(f"the copy {target / path} differs from its source; nothing was deleted")
            bar.advance()


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    return folder.resolve()


def _check_target(root: Path, to: Path) -> Path:
    target = to.expanduser().resolve()
    if target == root or target.is_relative_to(root) or root.is_relative_to(target):
        raise UserError(f"--to {to}: neither folder may contain the other ({root}); choose another")
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {to} is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()):
        begun = read_manifest(target)  # of a copy that was cut short
        if begun is None or begun.source != str(root):
            raise UserError(f"--to {to} is not empty; choose a new folder")
    return target


def _confirm(plan: ArchivePlan) -> bool:
    what = f"{len(plan.delete)} folders ({format_size(plan.freed)}) of {len(plan.runs)} runs"
    if not sys.stdin.isatty():
        raise UserError(f"{what} would be deleted from {plan.root}; add --yes (--dry-run shows which)")
    return input(f"delete {what} from {plan.root}? [y/N] ").strip().lower() in ("y", "yes")


def _report(plan: ArchivePlan, target: Path | None, dry_run: bool, copies: list[DataCopy]) -> dict[str, Any]:
    return {
        "from": str(plan.root),
        "to": None if target is None else str(target),
        "dry_run": dry_run,
        "runs": len(plan.runs),
        "best": [str(run) for run in plan.best],
        "kept_files": len(plan.files),
        "kept_bytes": sum(plan.files.values()),
        "kept_adapters": [p.as_posix() for p in plan.adapters],
        "copied_files": 0 if target is None or dry_run else len(plan.files),
        "deleted": [{"path": p.as_posix(), "bytes": n} for p, n in plan.delete.items()],
        "freed_bytes": plan.freed,
        "links": [p.as_posix() for p in plan.links],
        "data": [
            {"hash": c.hash, "tier": c.tier, "files": [*c.files.values()], "bytes": c.bytes, "copied": not dry_run}
            for c in copies
        ],
        "crate": None if dry_run else str((target or plan.root) / CRATE),
    }


def _show(plan: ArchivePlan, target: Path | None, dry_run: bool, copies: list[DataCopy]) -> None:
    would = "would be " if dry_run else "to be "
    kept = f"{len(plan.files)} files ({format_size(sum(plan.files.values()))})"
    print(f"{len(plan.runs)} runs in {plan.root}")
    print(f"{would}kept: {kept}" + (f", {would}copied to {target}" if target else ""))
    for path in plan.adapters:
        print(f"  adapter {path}")
    for copy in copies:
        print(f"  data {', '.join(copy.places)} ({copy.tier}, {format_size(copy.bytes)})")
    print(f"{would}deleted: {len(plan.delete)} folders ({format_size(plan.freed)})")
    for path, length in plan.delete.items():
        print(f"  {path} ({format_size(length)})")
    if plan.links:
        print(f"left alone, because they are links: {', '.join(map(str, plan.links))}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser(
        "archive", "Keep the results and the best adapters of a finished experiment, delete the other adapters."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run, a sweep, or a folder above")
    parser.add_argument("--to", metavar="DIR2", type=Path, help="first copy the kept files there")
    parser.add_argument(
        "--keep", choices=(BEST, ALL, NONE), default=BEST, help="adapters: the best configuration's last (default)"
    )
    parser.add_argument("--data", action="store_true", help="copy the data too: green, or yellow with permission")
    parser.add_argument(
        "--license", metavar="TEXT", help="of the archive, for its description: an address or a sentence"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; change nothing")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask for confirmation")
    return parser.run(argv, lambda o: archive(o.folder, o.to, o.keep, o.dry_run, o.yes, o.data, o.license))


if __name__ == "__main__":
    raise SystemExit(main())
