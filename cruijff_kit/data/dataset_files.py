"""Where the rows of a data set lie: from `dataset.path` to the files of each split. No torch; nothing is read but names.

words.json                      one file with the splits inside (JSON: {"train": [...], ...}; else a column `split`)
train.jsonl                     one file that is one split
folder/{train,test}.parquet     a file a split; also train-00000-of-00002.parquet and so on, also inside folder/data
folder/dataset_dict.json        what datasets.save_to_disk writes
{train: a.csv, test: b.csv}     files that are named one by one
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.util.errors import UserError

FORMATS = {
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}
"""format -> the endings of its files."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # stand beside data, hold none
_USUAL = ("train", "validation", "test")

DataPath = str | Mapping[str, str]
"""`dataset.path`: a file, a folder, or {split: file}."""


@dataclass(frozen=True)
class File:
    """A file and the format it is read in."""

    path: Path
    format: str


@dataclass(frozen=True)
class Layout:
    """The files of a data set: either `whole`, one file that says itself which splits it has, or `splits`."""

    whole: File | None
    splits: dict[str, tuple[File, ...]]

    @property
    def files(self) -> list[File]:
        """Every file that may be read, in order of split and shard."""
        return [self.whole] if self.whole else [f for split in sorted(self.splits) for f in self.splits[split]]


def locate(path: DataPath, format: str | None = None) -> Layout:
    """Find the files of a data set.

    Args:
        path: a file, a folder, or {split: file}.
        format: one of FORMATS; None: as the names say.
    Raises:
        UserError: nothing is there, or it is not clear what.
    """
    if isinstance(path, Mapping):
        if not path:
            raise UserError("dataset.path={} names no file; write {train: FILE, validation: FILE, test: FILE}")
        return Layout(None, {split: (_file(_existing(str(name)), format),) for split, name in path.items()})
    place = _existing(path)
    if place.is_file():
        return Layout(_file(place, format), {})
    if format in (None, "arrow") and (found := _saved_to_disk(place)):
        return Layout(None, found)
    found = _files_of(place, format) or _files_of(place / "data", format)
    if not found:
        endings = ", ".join(e for ends in (FORMATS[f] for f in ([format] if format else FORMATS)) for e in ends)
        raise UserError(
            f"dataset.path: {place} holds no data; a file for each split is looked for, named SPLIT{endings}"
        )
    return Layout(None, found)


def default_split(file: File) -> str:
    """The name of the one split of a file that names none: the file's own where that is usual, else train."""
    return file.path.stem if file.path.stem in _USUAL else "train"


def file_hash(path: DataPath, format: str | None = None) -> str:
    """sha256 of all the files of a data set and of their names, where there are several; 16 hex digits."""
    files = locate(path, format).files
    digests = [_digest(f.path, *_version(f.path)) for f in files]
    if len(files) == 1:
        return digests[0][:16]
    named = "".join(f"{f.path.parent.name}/{f.path.name} {d}\n" for f, d in zip(files, digests, strict=True))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def digest_of(path: DataPath, format: str | None = None) -> bytes:
    """A key that only who has the data can know: unlike `file_hash`, of which the half is kept, it is written nowhere."""
    digests = [_digest(f.path, *_version(f.path)) for f in locate(path, format).files]
    return hashlib.sha256(" ".join(["key", *digests]).encode()).digest()


def version(path: DataPath, format: str | None = None) -> list[list]:
    """What changes when a file of the data set does: names, times, sizes."""
    return [[str(f.path), *_version(f.path)] for f in locate(path, format).files]


def _version(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_size


@functools.lru_cache(maxsize=64)
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"dataset.path: no such file {path}")
    return place


def _file(path: Path, format: str | None) -> File:
    if path.is_dir():
        raise UserError(f"dataset.path: {path} is a folder where a file is expected")
    if format is None:
        format = next((f for f, endings in FORMATS.items() if path.suffix.lower() in endings), None)
    if format is None:
        raise UserError(f"dataset.path: what is in {path} cannot be told from its name; add dataset.format=json, "
                        "jsonl, csv, parquet or arrow")  # fmt: skip
    return File(path, format)


def _files_of(folder: Path, format: str | None) -> dict[str, tuple[File, ...]]:
    """The files of a folder by split; shards of a split together."""
    endings = [e for f in ([format] if format else FORMATS) for e in FORMATS[f]]
    found: dict[str, list[File]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in endings and path.is_file() and path.name not in ABOUT and path.name[0] != ".":
            shard = _SHARD.fullmatch(path.stem)
            found.setdefault(shard[1] if shard else path.stem, []).append(_file(path, format))
    for split, files in found.items():
        _check_shards(folder, split, files)
    return {split: tuple(files) for split, files in found.items()}


def _check_shards(folder: Path, split: str, files: list[File]) -> None:
    shards = [_SHARD.fullmatch(f.path.stem) for f in files]
    if len(files) > 1 and (not all(shards) or len({f.format for f in files}) > 1):
        names = " and ".join(f.path.name for f in files[:2])
        raise UserError(
            f"dataset.path: {folder} holds both {names}; take one away, or choose by dataset.format={files[0].format}"
        )
    if all(shards) and [int(s[2]) for s in shards] != list(range(int(shards[0][3]))):
        raise UserError(
            f"dataset.path: {folder} holds {len(files)} of the {int(shards[0][3])} files of split {split!r}"
        )


def _saved_to_disk(folder: Path) -> dict[str, tuple[File, ...]] | None:
    """The files of a folder that datasets.save_to_disk wrote; None if it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json")["splits"]
        return {split: _arrow_files(folder / split)[1] for split in splits}
    if (folder / "state.json").is_file():
        split, files = _arrow_files(folder)
        return {split or "train": files}
    return None


def _arrow_files(folder: Path) -> tuple[str | None, tuple[File, ...]]:
    state = _json(_existing(str(folder / "state.json")))
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} was saved with an index beside it; load it with datasets and save it again after flatten_indices()"
        )
    files = tuple(File(_existing(str(folder / f["filename"])), "arrow") for f in state["_data_files"])
    return state.get("_split"), files


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
