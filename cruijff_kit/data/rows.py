"""Rows as they stand in a user's file, checked before anything is loaded. No torch."""

import functools
import hashlib
import json
import re
from pathlib import Path

from cruijff_kit.errors import UserError
from cruijff_kit.hints import did_you_mean

Row = dict[str, object]
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def read_split(path: str, split: str) -> list[Row]:
    """The rows of one split of a JSON file ``{"train": [...], "validation": [...], ...}``.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON or not of that layout, or the split is missing or empty.
    """
    splits = _read(str(path), *_version(path))
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; {did_you_mean(split, [*splits])}")
    if not splits[split]:
        raise UserError(f"{path}: split {split!r} is empty")
    return splits[split]


def file_hash(path: str) -> str:
    """sha256 of the data file, 16 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def text(row: Row, column: str, where: str) -> str:
    """One cell, which must be text.

    Args:
        row: the row.
        column: the column's name.
        where: file, split and row number, for the message.
    Raises:
        UserError: the column is missing or its value is not a string.
    """
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; {did_you_mean(column, [*row])}")
    if not isinstance(row[column], str):
        raise UserError(
            f"{where}: column {column!r} must be text in quotes, not {type(row[column]).__name__} {row[column]!r:.40}"
        )
    return row[column]


def fill(prompt: str, row: Row, column_map: dict[str, str], where: str) -> str:
    """The prompt with each ``{column}`` replaced by the row's value; other braces are kept as they are.

    Raises:
        UserError: the prompt names no column, or one that the row lacks.
    """
    names = _PLACEHOLDER.findall(prompt)
    if not names:
        raise UserError(f"dataset.prompt={prompt!r} names no column, so every row would ask the same; write {{input}}")
    return _PLACEHOLDER.sub(lambda m: text(row, column_map.get(m[1], m[1]), where), prompt)


def _version(path: str) -> tuple[int, int]:
    file = Path(path)
    if not file.exists():
        raise UserError(f"dataset.path: no such file {path}")
    if not file.is_file():
        raise UserError(f"dataset.path: {path} is not a file; give one JSON file with the splits inside")
    return file.stat().st_mtime_ns, file.stat().st_size


@functools.lru_cache(maxsize=4)
def _read(path: str, mtime_ns: int, size: int) -> dict[str, list[Row]]:
    raw = Path(path).read_bytes()
    try:
        splits = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 (line {line}, byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a data set: its JSON is nested too deep") from error
    layout = 'expected {"train": [{"input": ..., "output": ...}, ...], "validation": [...], "test": [...]}'
    if not isinstance(splits, dict):
        raise UserError(f"{path} holds a {type(splits).__name__}; {layout}")
    for name, rows in splits.items():
        if not isinstance(rows, list):
            raise UserError(f"{path}: split {name!r} is a {type(rows).__name__}, not a list of rows; {layout}")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, split {name!r}, row {number}: a {type(row).__name__}, not an object; {layout}"
                )
    return splits
