"""Rows as they stand in a user's files, checked before anything is loaded. No torch."""

import random
import re
from collections.abc import Iterable

from cruijff_kit.data.dataset_files import DataPath, File, default_split, locate
from cruijff_kit.data.readers import Row, read
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import active, quoted, quoted_names
from cruijff_kit.util.suggest import did_you_mean, nearest

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_USUAL = ("train", "training", "validation", "valid", "val", "dev", "test")
_HOW = {  # what to type where a number is not text, by its type
    "float": "decimals can be written in many ways, so write them as text yourself, or round them to whole numbers",
    "bool": "write text, for example yes and no, or 1 and 0",
}


def read_split(path: DataPath, split: str, format: str | None = None, split_column: str | None = "split") -> list[Row]:
    """The rows of one split.

    Args:
        path: a file, a folder, or {split: file}.
        split: the split's name.
        format: json, jsonl, csv, parquet or arrow; None: as the names say.
        split_column: of a single file, the column that names each row's split, where there is one; None: not looked for.
    Raises:
        UserError: the files are missing or malformed, or the split is missing or empty.
    """
    splits = read_splits(path, format, split_column, only=split)
    shown = path if isinstance(path, str) else f"dataset.path={dict(path)}"
    if split not in splits:
        if len(splits) == 1 and not nearest(split, [*splits]):
            (single,) = splits
            raise UserError(
                f"{shown} has no split {split!r}: all its rows are {_named(single)}; "
                f"{_without(split)}give the others too, or a column that names each row's split (dataset.split_column)"
            )
        raise UserError(f"{shown} has no split {split!r}; {did_you_mean(split, quoted_splits(splits))}")
    if not splits[split]:
        raise UserError(f"{shown}: split {split!r} is empty")
    return splits[split]


def read_splits(
    path: DataPath, format: str | None = None, split_column: str | None = "split", only: str | None = None
) -> dict[str, list[Row]]:
    """Every split with its rows; arguments and errors as `read_split`.

    Args:
        only: read the files of this split alone; the others are listed without rows.
    """
    layout = locate(path, format)
    if layout.whole is None:
        wanted = {s: layout.splits[s] if only in (None, s) else () for s in layout.splits}
        return {split: [row for file in files for row in _rows(file)] for split, files in wanted.items()}
    content = read(layout.whole)
    if isinstance(content, dict):
        return content
    if split_column is None or not content or split_column not in content[0]:
        return {default_split(layout.whole): content}
    splits: dict[str, list[Row]] = {}
    for number, row in enumerate(content):
        splits.setdefault(text(row, split_column, f"{path}, row {number}"), []).append(row)
    return splits


def quoted_splits(splits: Iterable[str]) -> list[str]:
    """Names of splits as a message may list them: of red data the usual ones, because any column can name splits."""
    return [*splits] if not active() else [s for s in splits if s in _USUAL]


def _named(split: str) -> str:
    return repr(split) if quoted_splits([split]) else quoted(split)


def chosen(count: int, max_samples: int | None, seed: int | None, split: str) -> list[int]:
    """Which rows of a split are used, in the file's order.

    Args:
        count: rows of the split.
        max_samples: at most so many; None: all.
        seed: None: the first ones; a number: drawn with it, so that a larger choice holds the smaller.
        split: the split's name; each draws for itself.
    """
    if max_samples is None or max_samples >= count:
        return list(range(count))
    if seed is None:
        return list(range(max_samples))
    order = list(range(count))
    random.Random(f"{seed} {split}").shuffle(order)
    return sorted(order[:max_samples])


def text(row: Row, column: str, where: str) -> str:
    """One cell as text: text as it is, whole numbers in digits; anything else is refused.

    Args:
        row: the row.
        column: the column's name.
        where: file, split and row number, for the message.
    Raises:
        UserError: the column or the value is missing, or could be written in more than one way.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; {did_you_mean(column, quoted_names(row))}")
    if value is None:
        raise UserError(f"{where}: column {column!r} is empty; fill it in, or leave the row out")
    kind = type(value).__name__
    hint = f"; {_HOW[kind]}" if kind in _HOW else ""
    raise UserError(f"{where}: column {column!r} must be text or a whole number, not {kind} {quoted(value, 40)}{hint}")


def fill(prompt: str, row: Row, column_map: dict[str, str], where: str) -> tuple[str, list[str]]:
    """The prompt with each ``{column}`` replaced by the row's value, and those values; other braces are kept as they are.

    Raises:
        UserError: the prompt names no column, or one that the row lacks.
    """
    if not _PLACEHOLDER.search(prompt):
        raise UserError(f"dataset.prompt={prompt!r} names no column, so every row would ask the same; write {{input}}")
    values: list[str] = []

    def value(match: re.Match) -> str:
        values.append(text(row, column_map.get(match[1], match[1]), where))
        return values[-1]

    return _PLACEHOLDER.sub(value, prompt), values


def named_columns(prompt: str) -> list[str]:
    """The columns that stand in a prompt's braces."""
    return _PLACEHOLDER.findall(prompt)


def _rows(file: File) -> list[Row]:
    content = read(file)
    if isinstance(content, dict):
        raise UserError(
            f"{file.path} holds an object where a list of this split's rows is expected; if the splits are inside it, "
            f"set dataset.path={file.path}"
        )
    return content


def _without(split: str) -> str:
    if split == "validation":
        return "set dataset.validation_split=null to train without validation, "
    return "set eval=none to train only, " if split == "test" else ""
