"""archive.json: what cruijff-kit archive kept of an experiment, with hashes, and what it deleted."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cruijff_kit.models.adapter_files import is_adapter_folder
from cruijff_kit.records.run_folder import RunFolder, find_above, find_folders, parse_epoch
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import require_folder, write_text
from cruijff_kit.util.format import now

NAME = "archive.json"
COPYING, DELETING, DONE = "copying", "deleting", "done"


@dataclass
class DeletedFolder:
    """A folder that was deleted."""

    path: str
    """Below the archive."""
    bytes: int
    files: dict[str, str] = field(default_factory=dict)
    """Files of an adapter -> sha256."""


@dataclass
class ArchivedData:
    """A data set that was copied into the archive; paths are relative to it."""

    hash: str
    """Hash as in the runs' result.json."""
    tier: str
    places: dict[str, str]
    """Path in a run's config -> where that lies in the archive."""
    files: dict[str, dict[str, Any]]
    """Path -> sha256 and bytes."""


@dataclass
class ArchiveManifest:
    """An archive; paths are relative to its folder."""

    source: str
    """The folder that was archived."""
    keep: str
    """best, all or none."""
    best: list[str] = field(default_factory=list)
    """Runs of the best configuration, "." for the folder itself."""
    created: str = field(default_factory=now)
    state: str = COPYING
    """copying, deleting or done."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """path -> sha256 and bytes, of what was kept when this was written."""
    deleted: list[DeletedFolder] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Symbolic links, which were left alone."""
    data: list[ArchivedData] = field(default_factory=list)
    """Data that was copied with --data: it is in the copy, not in `source`."""
    version: int = 1


def read_manifest(folder: Path) -> ArchiveManifest | None:
    """Read the manifest in a folder; None if there is none.

    Raises:
        UserError: the file is not of this version.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        parts = {
            "deleted": [DeletedFolder(**d) for d in tree["deleted"]],
            "data": [ArchivedData(**d) for d in tree["data"]],
        }
        return ArchiveManifest(**tree | parts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not an archive of this version of cruijff_kit: {error}") from error


def write_manifest(manifest: ArchiveManifest, folder: Path) -> None:
    """Write archive.json into a folder."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    write_text(folder / NAME, text + "\n")


def find_archived_epochs(run: Path) -> dict[int, tuple[DeletedFolder, Path]]:
    """Return epoch -> its deleted folder and the archive.json that lists it, of a run's archived adapters."""
    above = find_above(run, NAME)
    manifest = read_manifest(above) if above else None
    if above is None or manifest is None:
        return {}
    own = PurePosixPath(run.absolute().relative_to(above).as_posix())
    gone = {PurePosixPath(d.path): d for d in manifest.deleted if not (above / d.path).exists()}
    epochs = {parse_epoch(p.name): d for p, d in gone.items() if p.parent == own}
    return {epoch: (d, above / NAME) for epoch, d in epochs.items() if epoch is not None}


def find_archived_data(run: Path, hash: str | None) -> dict[str, str]:
    """Return path in a run's config -> the copy of that data in the run's archive, if it has one."""
    above = find_above(run, NAME)
    manifest = read_manifest(above) if above else None
    if above is None or manifest is None:
        return {}
    copies = [d.places for d in manifest.data if d.hash == hash]
    paths = {old: above / new for places in copies for old, new in places.items()}
    return {old: str(new) for old, new in paths.items() if new.exists()}


def reject_archived(run: Path, epochs: list[int] | None = None) -> None:
    """Raise UserError if an adapter of these epochs (None: any of the run's) was archived away."""
    gone = find_archived_epochs(run)
    archived = [e for e in (sorted(gone) if epochs is None else epochs) if e in gone]
    if archived:
        where = gone[archived[0]][1]
        some = ", ".join(map(str, archived))
        raise UserError(
            f"the adapter of epoch {some} of {run} was deleted by archive (see {where}); train it again: "
            f"cruijff-kit reproduce {run}"
        )


def require_epochs(folder: RunFolder) -> list[int]:
    """Return the epochs whose adapters a run's folder holds, as `RunFolder.epochs`, at least one.

    Raises:
        UserError: none, or it is no run's folder.
    """
    path = folder.path
    require_folder(path)
    if saved := folder.epochs():
        return saved
    if is_adapter_folder(path):
        raise UserError(f"{path} is an adapter; give the run's folder: {path.parent}")
    reject_archived(path)
    if runs := sorted(set(find_folders(path, "result.json")) - {path}):
        raise UserError(f"{path} holds several runs; give the folder of one, for example {runs[0]}")
    raise UserError(f"{path} holds no saved adapter (epoch_N): is it a run, and did epochs_to_save keep one?")
