"""Data in another format: `cruijff-kit data convert SOURCE FOLDER [--to parquet|jsonl|json] [--json]`.

Any layout that can be read becomes a folder with a file for each split. What was written is read again and compared.
--json: {"source", "target", "files", "rows": {split: rows}, "hash"}.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.config.data_policy import check_agent, enable_redaction_for
from cruijff_kit.data.dataset_files import FORMATS, hash_data
from cruijff_kit.data.readers import Row
from cruijff_kit.data.rows import read_splits
from cruijff_kit.data.tiers import GREEN, RED, TIER_FILE, find_tier, write_tier
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import atomic
from cruijff_kit.util.redaction import quote


def convert(
    source: str,
    target: Path,
    to: str = "parquet",
    format: str | None = None,
    split_column: str | None = "split",
    permission: str | None = None,
    agent: bool | None = None,
) -> dict[str, Any]:
    """Write the splits of a data set into a new folder, one file each.

    Args:
        source, format, split_column: as `rows.read_splits`.
        target: the folder; it must not exist, or be empty.
        to: parquet, jsonl or json.
        permission, agent: as dataset.permission and agent of a run.
    Returns:
        source, target, files, rows (by split), the hash of what was written, and the tier, which a file TIER beside it says
        where it is not green.
    Raises:
        UserError: the source cannot be read, the folder is taken, or a column cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; name a folder that does not exist")
    tier = find_tier(source, format)
    check_agent(tier, permission, agent, "--permission ", "{}")
    enable_redaction_for(tier)
    splits = read_splits(source, format, split_column)
    for split, rows in splits.items():
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise UserError(f"{source}: a split called {quote(split)} cannot be the name of a file; rename it")
        if not rows:
            raise UserError(f"{source}: split {split!r} is empty")
    with atomic(target) as draft:
        draft.mkdir(mode=0o700 if tier == RED else 0o777)
        for split, rows in splits.items():
            _WRITERS[to](rows, draft / f"{split}.{to}", f"{source}, split {split!r}")
        if tier != GREEN:
            write_tier(draft, tier)
        _compare(source, splits, read_splits(str(draft), to))
    files = [str(target / f"{split}.{to}") for split in splits]
    counts = {split: len(rows) for split, rows in splits.items()}
    made = {"source": source, "target": str(target), "files": files, "rows": counts}
    return made | {"hash": hash_data(str(target), to), "tier": tier}


def _write_parquet(rows: list[Row], path: Path, where: str) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for column in dict.fromkeys(c for row in rows for c in row):
        try:
            columns[column] = pyarrow.array([row.get(column) for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise UserError(f"{where}: column {column!r} does not fit into one column of Parquet: {one_line(error)}; "
                            "make its values of one kind, or add --to jsonl") from error  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _write_jsonl(rows: list[Row], path: Path, where: str) -> None:
    path.write_text("".join(_json(row, where) + "\n" for row in rows), encoding="utf-8")


def _write_json(rows: list[Row], path: Path, where: str) -> None:
    path.write_text("[\n" + ",\n".join(_json(row, where) for row in rows) + "\n]\n", encoding="utf-8")


def _json(row: Row, where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{where}: a value cannot be written as JSON: {one_line(error)}; add --to parquet") from error


_WRITERS = {"parquet": _write_parquet, "jsonl": _write_jsonl, "json": _write_json}


def _compare(source: str, splits: dict[str, list[Row]], written: dict[str, list[Row]]) -> None:
    for split, rows in splits.items():
        for number, (before, after) in enumerate(zip(rows, written[split], strict=True)):
            if repr(_plain(before)) != repr(_plain(after)):
                column = next(c for c in before if repr(_plain(before[c])) != repr(_plain(after.get(c))))
                would = quote(after.get(column), 40)
                raise UserError(
                    f"{source}, split {split!r}, row {number}: column {column!r} would become {would}, "
                    f"not {quote(before[column], 40)}; make its values of one kind, or add --to jsonl"
                )


def _plain(value: Any) -> Any:
    """Return a comparable form of a value: sorted keys, no keys with None, NaN as None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in sorted(value.items()) if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser("data convert", __doc__.splitlines()[0], "print the result as JSON")
    parser.add_argument("source", metavar="SOURCE", help="a file or a folder, as dataset.path")
    parser.add_argument("target", metavar="FOLDER", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--to", choices=tuple(_WRITERS), default="parquet", help="format to write (default: parquet)")
    parser.add_argument("--format", choices=tuple(FORMATS), help="format of the source (default: as its name says)")
    parser.add_argument("--split-column", default="split", metavar="COLUMN", help="column that names each row's split")
    parser.add_argument(
        "--permission", metavar="TEXT", help="yellow data: who allowed a coding agent to use it, and when"
    )
    parser.add_argument(
        "--agent", action=argparse.BooleanOptionalAction, help="a coding agent gives the command, or not"
    )

    def command(options: argparse.Namespace) -> dict[str, Any]:
        how = (options.to, options.format, options.split_column, options.permission, options.agent)
        made = convert(options.source, options.target, *how)
        if not options.json:
            for file, (split, count) in zip(made["files"], made["rows"].items(), strict=True):
                print(f"{file}  {count} row{'s' * (count != 1)} of split {split!r}")
            if made["tier"] != GREEN:
                print(f"{options.target / TIER_FILE} says {made['tier']}, as beside {options.source}")
        return made

    return parser.run(argv, command)
