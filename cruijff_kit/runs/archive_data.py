"""Plan the copies of archived runs' data: which may be copied into the archive, and where to.

Green data may be copied; yellow data if every run that used it names who allowed that; red data never. The copy has the
hash of the runs' data.
"""

from dataclasses import dataclass, field
from pathlib import Path

from cruijff_kit.data.dataset_files import METADATA_FILES, DataPath, find_files, hash_data
from cruijff_kit.data.generators import generate
from cruijff_kit.data.tiers import RED, YELLOW, find_tier, strictest_tier
from cruijff_kit.records.archive_manifest import ArchivedData
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.records.saved_config import load_saved_config
from cruijff_kit.runs.provenance import find_original_cwd, resolve_path
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import hash_file

FOLDER = "data"


@dataclass
class DataCopy:
    """A data set that is to be copied."""

    hash: str
    tier: str
    places: dict[str, str] = field(default_factory=dict)
    """Path in a run's config -> path in the archive."""
    files: dict[Path, str] = field(default_factory=dict)
    """File -> path of its copy below the archive."""

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.files)

    def to_manifest(self) -> ArchivedData:
        """Return the entry of archive.json, with hashes."""
        known = {to: {"sha256": hash_file(file), "bytes": file.stat().st_size} for file, to in self.files.items()}
        return ArchivedData(self.hash, self.tier, self.places, known)


def plan_data_copies(runs: list[Path]) -> list[DataCopy]:
    """Plan the copies of the runs' data sets, each once.

    Raises:
        UserError: data that may not be copied, is missing, or has changed; the message names the run.
    """
    copies: dict[tuple[str, ...], DataCopy] = {}
    for run in runs:
        path = run / "result.json"
        result = read_result(path) if path.is_file() else None
        if result is not None and result.data_hash is not None:
            copy = _plan_copy(run, result)
            copies.setdefault((copy.hash, *copy.files.values()), copy).places.update(copy.places)
    return [*copies.values()]


def _plan_copy(run: Path, result: RunResult) -> DataCopy:
    """Plan the copy of a run's data. Generated data is generated again if it is missing."""
    data, began = load_saved_config(run).dataset, find_original_cwd(run)
    path: DataPath = data.path
    if data.generator is not None:
        path = str(generate(data.generator, data.arguments))
    elif isinstance(path, str):
        path = resolve_path(path, began)
    else:
        path = {split: resolve_path(file, began) for split, file in path.items()}
    tier = strictest_tier([result.tier, *([] if data.generator else [find_tier(path, data.format)])])
    _refuse_sensitive(run, tier, result.permission)
    try:
        now = hash_data(path, data.format)
    except (UserError, OSError) as error:
        raise UserError(f"--data: the data of {run} is not at {path}; put it back, or leave --data out") from error
    if now != result.data_hash:
        raise UserError(
            f"--data: {path} is not what {run} was made of (hash {now}, then {result.data_hash}); restore it, or "
            "leave --data out"
        )
    return _fill_places(DataCopy(now, tier), data.path, path, data.format)


def _refuse_sensitive(run: Path, tier: str, permission: str | None) -> None:
    if tier == RED:
        raise UserError(f"--data: the data of {run} is red, and red data is never copied; leave --data out")
    if tier == YELLOW and not (permission or "").strip():
        raise UserError(
            f"--data: the data of {run} is yellow, and its result.json names nobody who allowed its use "
            "(dataset.permission); leave --data out"
        )


def _fill_places(copy: DataCopy, typed: DataPath, path: DataPath, format: str | None) -> DataCopy:
    """Fill in the files and paths of a copy. Files keep their names and those of their folders, which the hash includes.

    Args:
        typed: dataset.path as the run's config has it. path: its present path.
    """
    below = f"{FOLDER}/{copy.hash}"
    if not isinstance(path, str):
        assert not isinstance(typed, str)
        for number, (split, name) in enumerate(path.items()):  # two files may have one name
            file = Path(name).expanduser()
            copy.files[file] = f"{below}/{number}/{file.absolute().parent.name}/{file.name}"
            copy.places[str(typed[split])] = copy.files[file]
        return copy
    root = Path(path).expanduser().absolute()
    copy.places[str(typed)] = f"{below}/{root.name}"
    files = {f.path.absolute() for f in find_files(path, format).files}
    if root.is_dir():  # what says which of them is which split goes, too
        files |= {f for name in METADATA_FILES for f in root.rglob(name)}
    copy.files = {f: f"{below}/{f.relative_to(root.parent).as_posix()}" for f in sorted(files)}
    return copy
