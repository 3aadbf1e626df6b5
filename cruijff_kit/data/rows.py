"""Read the rows of a user's files and check them before anything is loaded. No torch."""

import random
import re
from collections.abc import Iterable

from cruijff_kit.data.dataset_files import DataFile, DataPath, default_split, find_files
from cruijff_kit.data.readers import Row, read_file
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote, quote_names
from cruijff_kit.util.suggest import did_you_mean, find_nearest

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_USUAL = ("train", "training", "validation", "valid", "val", "dev", "test")
_ADVICE = {  # what to do with a value that is not text, by its type
    "float": "decimals can be written in many ways, so write them as text yourself, or round them to whole numbers",
    "bool": "write text, for example yes and no, or 1 and 0",
}


def read_split(path: DataPath, split: str, format: str | None = None, split_column: str | None = "split") -> list[Row]:
    """Read the rows of one split.

    Args:
        path: a file, a folder, or {split: file}.
        split: the split's name.
        format: json, jsonl, csv, parquet or arrow; None: by the endings of the names.
        split_column: the column of a single file that names each row's split, if it has one; None: there is none.
    Raises:
        UserError: the files are missing or malformed, or the split is missing or empty.
    """
    splits = read_splits(path, format, split_column, only=split)
    source = path if isinstance(path, str) else f"dataset.path={dict(path)}"
    if split not in splits:
        if len(splits) == 1 and not find_nearest(split, [*splits]):
            (single,) = splits
            raise UserError(
                f"{source} has no split {split!r}: all its rows are {_quote_split(single)}; "
                f"{_advise_without(split)}give the others too, or a column that names each row's split "
                "(dataset.split_column)"
            )
        raise UserError(f"{source} has no split {split!r}; {did_you_mean(split, quote_splits(splits))}")
    if not splits[split]:
        raise UserError(f"{source}: split {split!r} is empty")
    return splits[split]


def read_splits(
    path: DataPath, format: str | None = None, split_column: str | None = "split", only: str | None = None
) -> dict[str, list[Row]]:
    """Read every split; arguments and errors as `read_split`.

    Args:
        only: read only the files of this split; the others are listed without rows.
    """
    files = find_files(path, format)
    if files.single is None:
        selection = {s: files.splits[s] if only in (None, s) else () for s in files.splits}
        return {split: [row for file in shards for row in _read_rows(file)] for split, shards in selection.items()}
    content = read_file(files.single)
    if isinstance(content, dict):
        return content
    if split_column is None or not content or split_column not in content[0]:
        return {default_split(files.single): content}
    splits: dict[str, list[Row]] = {}
    for number, row in enumerate(content):
        splits.setdefault(cell_text(row, split_column, f"{path}, row {number}"), []).append(row)
    return splits


def quote_splits(splits: Iterable[str]) -> list[str]:
    """Return the split names that a message may list: of red data only usual names, because any column can name splits."""
    return [*splits] if not redaction.is_enabled() else [s for s in splits if s in _USUAL]


def _quote_split(split: str) -> str:
    return repr(split) if quote_splits([split]) else quote(split)


def select_rows(count: int, max_samples: int | None, seed: int | None, split: str) -> list[int]:
    """Return the numbers of the rows of a split that are used, in the order of the file.

    Args:
        count: rows of the split.
        max_samples: maximum number of rows; None: all.
        seed: None: the first rows; a number: random rows, of which a larger sample contains a smaller one.
        split: its name, which is part of the seed.
    """
    if max_samples is None or max_samples >= count:
        return list(range(count))
    if seed is None:
        return list(range(max_samples))
    order = list(range(count))
    random.Random(f"{seed} {split}").shuffle(order)
    return sorted(order[:max_samples])


def cell_text(row: Row, column: str, where: str) -> str:
    """Return a cell as text: text as it is, a whole number in digits.

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
        raise UserError(f"{where}: no column {column!r}; {did_you_mean(column, quote_names(row))}")
    if value is None:
        raise UserError(f"{where}: column {column!r} is empty; fill it in, or leave the row out")
    kind = type(value).__name__
    hint = f"; {_ADVICE[kind]}" if kind in _ADVICE else ""
    raise UserError(f"{where}: column {column!r} must be text or a whole number, not {kind} {quote(value, 40)}{hint}")


def fill_prompt(prompt: str, row: Row, column_map: dict[str, str], where: str) -> tuple[str, list[str]]:
    """Return the prompt with each {column} replaced by the row's value, and these values; other braces stay.

    Raises:
        UserError: the prompt names no column, or one that the row lacks.
    """
    if not _PLACEHOLDER.search(prompt):
        raise UserError(
            f"dataset.prompt={prompt!r} names no column, so every row would have the same prompt; write {{input}}"
        )
    values: list[str] = []

    def value(match: re.Match) -> str:
        values.append(cell_text(row, column_map.get(match[1], match[1]), where))
        return values[-1]

    return _PLACEHOLDER.sub(value, prompt), values


def prompt_columns(prompt: str) -> list[str]:
    """Return the columns that a prompt names in braces."""
    return _PLACEHOLDER.findall(prompt)


def _read_rows(file: DataFile) -> list[Row]:
    content = read_file(file)
    if isinstance(content, dict):
        raise UserError(
            f"{file.path} holds an object where a list of this split's rows is expected; if the splits are inside it, "
            f"set dataset.path={file.path}"
        )
    return content


def _advise_without(split: str) -> str:
    if split == "validation":
        return "set dataset.validation_split=null to train without validation, "
    return "set eval=none to train only, " if split == "test" else ""
