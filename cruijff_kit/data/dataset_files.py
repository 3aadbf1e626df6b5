"""Find the files of each split of a data set (`dataset.path`) by their names. No torch.

words.json                      one file with the splits inside (JSON: {"train": [...], ...}; else a column `split`)
train.jsonl                     one file that is one split
folder/{train,test}.parquet     one file per split; also train-00000-of-00002.parquet and so on, also inside folder/data
folder/dataset_dict.json        what datasets.save_to_disk writes
{train: a.csv, test: b.csv}     files named one by one
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import hash_file

FORMATS = {
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}
"""format -> the endings of its files."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""They lie beside data and hold none."""
_USUAL = ("train", "validation", "test")

DataPath = str | Mapping[str, str]
"""`dataset.path`: a file, a folder, or {split: file}."""


@dataclass(frozen=True)
class DataFile:
    """A file and the format it is read in."""

    path: Path
    format: str


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a data set."""

    single: DataFile | None
    """One file that holds all splits; None: `splits` lists the files."""
    splits: dict[str, tuple[DataFile, ...]]
    """Split -> its files; empty if there is a single file."""

    @property
    def files(self) -> list[DataFile]:
        """All files, in order of split and shard."""
        return [self.single] if self.single else [f for split in sorted(self.splits) for f in self.splits[split]]


def find_files(path: DataPath, format: str | None = None) -> DatasetFiles:
    """Find the files of a data set.

    Args:
        path: a file, a folder, or {split: file}.
        format: one of FORMATS; None: by the endings of the names.
    Raises:
        UserError: there are no data files, or it is not clear which they are.
    """
    if isinstance(path, Mapping):
        if not path:
            raise UserError("dataset.path={} names no file; write {train: FILE, validation: FILE, test: FILE}")
        return DatasetFiles(
            None, {split: (_make_file(_require_path(str(name)), format),) for split, name in path.items()}
        )
    root = _require_path(path)
    if root.is_file():
        return DatasetFiles(_make_file(root, format), {})
    if format in (None, "arrow") and (splits := _list_saved_to_disk(root)):
        return DatasetFiles(None, splits)
    splits = _list_files(root, format) or _list_files(root / "data", format)
    if not splits:
        endings = ", ".join(e for ends in (FORMATS[f] for f in ([format] if format else FORMATS)) for e in ends)
        raise UserError(f"dataset.path: {root} holds no data; expected one file per split, named SPLIT{endings}")
    return DatasetFiles(None, splits)


def default_split(file: DataFile) -> str:
    """Return the split of a file that names none: the file's name if that is usual, else train."""
    return file.path.stem if file.path.stem in _USUAL else "train"


def hash_data(path: DataPath, format: str | None = None) -> str:
    """Return the SHA-256 of a data set (of its files, and of their names if there are several) in 16 hex digits."""
    files = find_files(path, format).files
    digests = [_hash_cached(f.path, *_stamp(f.path)) for f in files]
    if len(files) == 1:
        return digests[0][:16]
    lines = "".join(f"{f.path.parent.name}/{f.path.name} {d}\n" for f, d in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def secret_digest(path: DataPath, format: str | None = None) -> bytes:
    """Return a key that only an owner of the data can compute: unlike `hash_data`, no part of it is written anywhere."""
    digests = [_hash_cached(f.path, *_stamp(f.path)) for f in find_files(path, format).files]
    return hashlib.sha256(" ".join(["key", *digests]).encode()).digest()


def file_stamps(path: DataPath, format: str | None = None) -> list[list]:
    """Return name, time and size of each file, which change with the data."""
    return [[str(f.path), *_stamp(f.path)] for f in find_files(path, format).files]


def _stamp(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_size


@functools.lru_cache(maxsize=64)
def _hash_cached(file: Path, mtime_ns: int, size: int) -> str:
    return hash_file(file)


def _require_path(path: str) -> Path:
    expanded = Path(path).expanduser()
    if not expanded.exists():
        raise UserError(f"dataset.path: no such file {path}")
    return expanded


def _make_file(path: Path, format: str | None) -> DataFile:
    if path.is_dir():
        raise UserError(f"dataset.path: {path} is a folder where a file is expected")
    if format is None:
        format = next((f for f, endings in FORMATS.items() if path.suffix.lower() in endings), None)
    if format is None:
        raise UserError(f"dataset.path: the format of {path} cannot be told from its name; add dataset.format=json, "
                        "jsonl, csv, parquet or arrow")  # fmt: skip
    return DataFile(path, format)


def _list_files(folder: Path, format: str | None) -> dict[str, tuple[DataFile, ...]]:
    """List the files of a folder by split, with all shards of a split."""
    endings = [e for f in ([format] if format else FORMATS) for e in FORMATS[f]]
    splits: dict[str, list[DataFile]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (
            path.suffix.lower() in endings
            and path.is_file()
            and path.name not in METADATA_FILES
            and path.name[0] != "."
        ):
            shard = _SHARD.fullmatch(path.stem)
            splits.setdefault(shard[1] if shard else path.stem, []).append(_make_file(path, format))
    for split, files in splits.items():
        _check_shards(folder, split, files)
    return {split: tuple(files) for split, files in splits.items()}


def _check_shards(folder: Path, split: str, files: list[DataFile]) -> None:
    shards = [_SHARD.fullmatch(f.path.stem) for f in files]
    if len(files) > 1 and (not all(shards) or len({f.format for f in files}) > 1):
        names = " and ".join(f.path.name for f in files[:2])
        raise UserError(
            f"dataset.path: {folder} holds both {names}; remove one, or choose by dataset.format={files[0].format}"
        )
    if all(shards) and [int(s[2]) for s in shards] != list(range(int(shards[0][3]))):
        raise UserError(
            f"dataset.path: {folder} holds {len(files)} of the {int(shards[0][3])} files of split {split!r}"
        )


def _list_saved_to_disk(folder: Path) -> dict[str, tuple[DataFile, ...]] | None:
    """List the files of a folder that datasets.save_to_disk wrote; None if it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json")["splits"]
        return {split: _arrow_files(folder / split)[1] for split in splits}
    if (folder / "state.json").is_file():
        split, files = _arrow_files(folder)
        return {split or "train": files}
    return None


def _arrow_files(folder: Path) -> tuple[str | None, tuple[DataFile, ...]]:
    state = _json(_require_path(str(folder / "state.json")))
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} was saved with an index beside it; load it with datasets and save it again after flatten_indices()"
        )
    files = tuple(DataFile(_require_path(str(folder / f["filename"])), "arrow") for f in state["_data_files"])
    return state.get("_split"), files


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
