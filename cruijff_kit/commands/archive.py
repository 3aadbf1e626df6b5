"""Archive a finished experiment, and delete the adapters that are not kept:

    cruijff-kit archive DIR [--to DIR2 [--data]] [--keep best|all|none] [--license TEXT]

Adapters (epoch_N), merged models and checkpoints are deleted, except for the adapters to keep: by default the last ones of
the best configuration (--keep best). Everything else stays in DIR. With --to it is first copied to DIR2, with the kept
adapters, and each copy is compared with its source before anything is deleted. archive.json lists the files, with hashes,
and the deleted folders; ro-crate-metadata.json describes the archive for repositories (ro_crate.py). --data copies the data
too (archive_data.py).
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
from cruijff_kit.records.run_folder import parse_epoch
from cruijff_kit.runs.archive_data import FOLDER as DATA
from cruijff_kit.runs.archive_data import DataCopy, plan_data_copies
from cruijff_kit.runs.archive_plan import ALL, BEST, NONE, ArchivePlan, plan_archive, refuse_unfinished
from cruijff_kit.runs.ro_crate import NAME as CRATE
from cruijff_kit.runs.ro_crate import read_runs, write_crate
from cruijff_kit.slurm.run_states import find_runs
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import atomic, hash_file
from cruijff_kit.util.format import format_size
from cruijff_kit.util.progress import progress


def archive(
    folder: Path,
    target: Path | None,
    keep: str,
    dry_run: bool,
    is_confirmed: bool,
    data: bool = False,
    license: str | None = None,
) -> dict[str, Any]:
    """Copy, verify and delete; return the JSON output.

    Raises:
        UserError: an unfinished run, an impossible target, data that must not or cannot be copied, or no terminal to
            confirm. Nothing was deleted.
        ClusterError: SLURM does not tell whether a run is active.
    """
    root = _require_folder(folder)
    archive_root = None if target is None else _check_target(root, target)
    if data and archive_root is None:
        raise UserError("--data copies the data to the archive; name it: --to DIR2")
    plan = plan_archive(root, keep)
    copies = plan_data_copies(plan.runs) if data else []
    _print_plan(plan, archive_root, dry_run, copies)
    report = _make_report(plan, archive_root, dry_run, copies)
    if dry_run:
        return report
    if plan.delete and not is_confirmed and not _confirm(plan):
        print("nothing was copied or deleted")
        return report | {"deleted": [], "freed_bytes": 0, "copied_files": 0, "data": [], "crate": None}
    manifest, results = _make_manifest(plan, keep), read_runs(root, plan.runs)
    if archive_root is not None:
        previous_manifest = read_manifest(archive_root)
        manifest.data = previous_manifest.data if previous_manifest else []
        manifest.data = [d for d in manifest.data if d.hash not in {c.hash for c in copies}]
        manifest.data += [c.to_manifest() for c in copies]
        write_manifest(manifest, archive_root)
        hashes = {path: entry["sha256"] for path, entry in manifest.files.items()}
        _copy({root / path: path for path in hashes}, archive_root, hashes)
        for copy, data_entry in zip(copies, manifest.data[len(manifest.data) - len(copies) :], strict=True):
            _copy(copy.files, archive_root, {path: entry["sha256"] for path, entry in data_entry.files.items()})
            write_tier(archive_root / DATA / copy.hash, copy.tier)
    manifest.state = DELETING
    write_manifest(manifest, root)
    refuse_unfinished(find_runs(root), root)  # a run may have been resumed in the meantime
    for path in plan.delete:
        shutil.rmtree(root / path)
    manifest.state = DONE
    for place in (root, archive_root):
        if place is not None:
            write_manifest(manifest, place)
            write_crate(place, manifest, results, license)
    print(f"{format_size(plan.freed)} freed; {root / NAME} lists the deleted folders")
    return report


def _make_manifest(plan: ArchivePlan, keep: str) -> ArchiveManifest:
    previous = read_manifest(plan.root)
    best = [run.relative_to(plan.root).as_posix() for run in plan.best]
    manifest = ArchiveManifest(str(plan.root), keep, best, links=[p.as_posix() for p in plan.links])
    deleted_by_path = {d.path: d for d in (previous.deleted if previous else [])}
    with progress("hashing", len(plan.files) + len(plan.delete)) as bar:
        for path, length in plan.files.items():
            manifest.files[path.as_posix()] = {"sha256": hash_file(plan.root / path), "bytes": length}
            bar.advance()
        for path, length in plan.delete.items():
            files = _hash_files(plan.root / path) if parse_epoch(path.name) is not None else {}
            folder = DeletedFolder(path.as_posix(), length, files)
            # an interrupted archive may have deleted half of a folder: its manifest has the hashes of all files
            known = deleted_by_path.get(folder.path, folder)
            deleted_by_path[folder.path] = known if len(known.files) > len(files) else folder
            bar.advance()
    present = {p.as_posix() for p in plan.adapters}
    manifest.deleted = [d for d in deleted_by_path.values() if d.path not in present]  # some may have been restored
    return manifest


def _hash_files(folder: Path) -> dict[str, str]:
    return {f.name: hash_file(f) for f in sorted(folder.iterdir()) if f.is_file() and not f.is_symlink()}


def _copy(files: dict[Path, str], target: Path, hashes: dict[str, str]) -> None:
    """Copy files and compare every copy with its source; identical copies that exist already are not written again.

    Args:
        files: source -> path below the target.
        hashes: path below the target -> sha256.
    Raises:
        OSError: a copy failed, or differs from its source.
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


def _check_target(root: Path, path: Path) -> Path:
    target = path.expanduser().resolve()
    if target == root or target.is_relative_to(root) or root.is_relative_to(target):
        raise UserError(f"--to {path}: neither folder may contain the other ({root}); choose another")
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {path} is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()):
        manifest = read_manifest(target)  # of an interrupted archive
        if manifest is None or manifest.source != str(root):
            raise UserError(f"--to {path} is not empty; choose a new folder")
    return target


def _confirm(plan: ArchivePlan) -> bool:
    summary = f"{len(plan.delete)} folders ({format_size(plan.freed)}) of {len(plan.runs)} runs"
    if not sys.stdin.isatty():
        raise UserError(f"{summary} would be deleted from {plan.root}; add --yes (--dry-run shows which)")
    return input(f"delete {summary} from {plan.root}? [y/N] ").strip().lower() in ("y", "yes")


def _make_report(plan: ArchivePlan, target: Path | None, dry_run: bool, copies: list[DataCopy]) -> dict[str, Any]:
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


def _print_plan(plan: ArchivePlan, target: Path | None, dry_run: bool, copies: list[DataCopy]) -> None:
    prefix = "would be " if dry_run else "to be "
    kept_files = f"{len(plan.files)} files ({format_size(sum(plan.files.values()))})"
    print(f"{len(plan.runs)} runs in {plan.root}")
    print(f"{prefix}kept: {kept_files}" + (f", {prefix}copied to {target}" if target else ""))
    for path in plan.adapters:
        print(f"  adapter {path}")
    for copy in copies:
        print(f"  data {', '.join(copy.places)} ({copy.tier}, {format_size(copy.bytes)})")
    print(f"{prefix}deleted: {len(plan.delete)} folders ({format_size(plan.freed)})")
    for path, length in plan.delete.items():
        print(f"  {path} ({format_size(length)})")
    if plan.links:
        print(f"symbolic links, which stay as they are: {', '.join(map(str, plan.links))}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
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
        "--license", metavar="TEXT", help="license in the archive's description: an address or a sentence"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; change nothing")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask for confirmation")
    return parser.run(argv, lambda o: archive(o.folder, o.to, o.keep, o.dry_run, o.yes, o.data, o.license))


if __name__ == "__main__":
    raise SystemExit(main())
