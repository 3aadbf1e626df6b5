"""Read files into rows (dicts), one function per format; errors name the file and the row. No torch.

A cell of a CSV file is its exact text; an empty cell is missing (None). Values of the other formats keep their types;
`rows.cell_text` turns them into text.
"""

import csv
import functools
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cruijff_kit.data.dataset_files import DataFile
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import quote, quote_names

Row = dict[str, Any]


def read_file(file: DataFile) -> Any:
    """Read a file: a list of rows, or from a JSON file a dict of splits. A file is read again only when it changes.

    Raises:
        UserError: the file is not of its format.
    """
    stat = file.path.stat()
    return _read_cached(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _read_cached(file: DataFile, mtime_ns: int, size: int) -> Any:
    return _READERS[file.format](file.path)


def _read_utf8(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is not UTF-8 but UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 (line {line}, byte {error.start}); save it as UTF-8") from error


def _require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise UserError(f"the key {quote(twice)} occurs twice in one object; rename one of them")
    return content


def _parse_json(text: str) -> Any:
    content = json.loads(text, object_pairs_hook=_require_unique_keys)
    if "\\ud" in text or "\\uD" in text:  # escapes can name half a character, which no tokenizer takes
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode-escape").decode()
            quoted_half = quote(half) if redaction.is_enabled() else half
            raise UserError(
                f"{quoted_half} is half a character (an unpaired surrogate); write the whole one"
            ) from error
    return content


def _describe_json_error(error: json.JSONDecodeError) -> str:
    return error.msg.partition(": ")[0]  # what follows is a piece of the file


def _quote_column(name: str) -> str:
    return repr(name) if quote_names([name]) else quote(name)


def _read_json(path: Path) -> Any:
    try:
        content = _parse_json(_read_utf8(path))
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and "; if each line is a row of its own, add dataset.format=jsonl"
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON: {_describe_json_error(error)} at {where}{lines or ''}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a data set: its JSON is nested too deep") from error
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    splits = content if isinstance(content, dict) else {"": content}
    layout = 'expected {"train": [{"input": ..., "output": ...}, ...], "validation": [...], "test": [...]}'
    if not isinstance(content, dict | list):
        raise UserError(f"{path} holds a {type(content).__name__}; {layout}")
    for name, rows in splits.items():
        if not isinstance(rows, list):
            raise UserError(f"{path}: split {name!r} is a {type(rows).__name__}, not a list of rows; {layout}")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                where = f"{path}, split {name!r}, row {number}" if name else f"{path}, row {number}"
                raise UserError(f"{where}: a {type(row).__name__}, not an object; {layout}")
    return content


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): it also splits at characters that may stand inside a JSON string.
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {len(rows)} (line {number})"
        try:
            row = _parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {_describe_json_error(error)} at column {error.colno}") from error
        except RecursionError as error:
            raise UserError(f"{where}: its JSON is nested too deep") from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not an object such as {{"
                            '"input": ..., "output": ...}')  # fmt: skip
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a long text is no error
    text = _read_utf8(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    rows: list[Row] = []
    try:
        header = next(lines, None)
        if not header:
            raise UserError(f"{path} is empty; its first line must name the columns")
        _check_header(path, header)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, row {len(rows)} (line {lines.line_num}): {len(cells)} cells, but {len(header)} columns; put "
                    "a cell with commas, semicolons or line breaks into double quotes"
                )
            rows.append({column: cell if cell != "" else None for column, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise UserError(f"{path}, row {len(rows)} (line {lines.line_num}) is not CSV: {error}") from error
    return rows


def _delimiter(path: Path, text: str) -> str:
    """Return tab for a .tsv, else whichever of comma, semicolon and tab gives the first line most columns."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = re.split("[\r\n]", text, maxsplit=1)[0]
    return max(",;\t", key=lambda d: len(next(csv.reader([first], delimiter=d), [])))


def _check_header(path: Path, header: list[str]) -> None:
    for column, count in Counter(header).items():
        if count > 1:
            raise UserError(
                f"{path}: {count} columns are called {_quote_column(column)}; rename them in its first line"
            )
        if not column.strip() and len(header) == 1:
            raise UserError(f"{path}: its first line must name the columns")


def _read_table(path: Path, table: Any) -> list[Row]:
    for column, count in Counter(table.column_names).items():
        if count > 1:
            raise UserError(f"{path}: {count} columns are called {_quote_column(column)}; rename them")
    table.validate(full=True)  # else damaged offsets end the process
    return table.to_pylist()


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # One file by itself: a folder named a=b above it is no column.
        return _read_table(path, pyarrow.parquet.ParquetFile(path).read())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not Parquet: {one_line(error)}") from error


def _read_arrow(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                table = pyarrow.ipc.open_file(source).read_all()
            return _read_table(path, table)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not Arrow: {one_line(error)}") from error


_READERS = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
