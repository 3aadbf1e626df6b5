"""The samples of a run, an .eval log or a CSV, by the columns that say which group each is of (`subgroups`)."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from cruijff_kit.analysis.subgroups import MOST_GROUPS, Row, pool
from cruijff_kit.config.data_policy import enable_redaction_for
from cruijff_kit.data.tiers import find_tier
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import find_folders
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import WITHHELD, quote, quote_names

_COLUMNS = ("TRUE_LABEL", "PREDICTION", "P(TRUE LABEL)")
_GROUP, _LOG_GROUP = "GROUP", "group"  # compared whatever their values look like


@dataclass
class GroupedSamples:
    """The samples of a file."""

    source: Path
    columns: dict[str, list[Row]]
    """Column -> the samples that have a value in it."""
    left_out: list[str] = field(default_factory=list)
    """Columns that were not asked for, and have a single value, many, or hardly one twice."""


def read_samples(path: Path, groups: list[str] | None = None, unit: str | None = None) -> GroupedSamples:
    """The samples of a CSV, a log or a run.

    Args:
        groups: columns of the CSV, or keys of the samples' metadata; None: all that name groups.
        unit: the column or key that says which samples belong together; None: what the log says, in a CSV none.
    Raises:
        UserError: no such file, no such group, or cells that cannot be read.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() == ".csv":
        enable_redaction_for(find_tier(path))
        return _read_csv(path, groups, unit)
    logs = _logs(path)
    for log in logs:
        _refuse_other_columns(log, groups or [])
    found = [samples for log in logs if (samples := read_logs([log], groups, unit)).columns]
    if len(found) > 1:
        raise UserError(f"{path} holds several logs with groups; give one, for example {min(s.source for s in found)}")
    if not found:
        _refuse_logs(path, logs, groups)
    if not are_shares(found[0].columns):
        raise UserError(
            f"the scores of {found[0].source} are numbers; groups are compared by accuracy, which needs right or wrong"
        )
    return found[0]


def read_logs(logs: Sequence[Path], groups: list[str] | None = None, unit: str | None = None) -> GroupedSamples:
    """The samples of the logs of one configuration (one for each seed), each sample once (`pool`).

    Args:
        groups, unit: as those of `read_samples`; of red data the caller checks that they may be told.
    Raises:
        UserError: no sample has the unit.
    """
    from cruijff_kit.evaluation.eval_logs import (
        list_group_columns,
        read_group_rows,
        reported_groups,
        unit_column,
    )  # inspect-ai

    first = str(logs[0])
    asked, unit = unit, unit or unit_column(first)
    told = reported_groups(first)
    given = [_LOG_GROUP] if told is None or _LOG_GROUP in told else []
    names = groups or [*dict.fromkeys([*list_group_columns(first), *given])]
    of_logs = [read_group_rows(str(log), names, unit) for log in logs]
    columns = {name: pool([[Row(**row) for row in rows[name]] for rows in of_logs]) for name in names}
    columns = {name: rows for name, rows in columns.items() if rows}
    if asked and columns and all(row.unit is None for rows in columns.values() for row in rows):
        raise UserError(f"no sample of {first} has {asked!r} in its metadata (--unit NAME names the respondent)")
    return _choose(logs[0], columns, groups, unit)


def are_shares(columns: Mapping[str, Sequence[Row]]) -> bool:
    """Whether all scores are between wrong and right; others are distances, which have no accuracy."""
    return all(0 <= row.correct <= 1 for rows in columns.values() for row in rows)


def _choose(source: Path, columns: dict[str, list[Row]], groups: list[str] | None, unit: str | None) -> GroupedSamples:
    """Those that were asked for, else those that name groups."""
    if groups:
        return GroupedSamples(source, columns)

    def names_groups(column: str, rows: list[Row]) -> bool:
        number = len({row.group for row in rows})
        return column in (_GROUP, _LOG_GROUP) or column != unit and 1 < number <= min(MOST_GROUPS, len(rows) / 2)

    kept = {column: rows for column, rows in columns.items() if names_groups(column, rows)}
    return GroupedSamples(source, kept, [column for column in columns if column not in kept])


def _refuse_logs(path: Path, logs: list[Path], groups: list[str] | None) -> NoReturn:
    from cruijff_kit.evaluation.eval_logs import list_group_columns  # inspect-ai

    there = dict.fromkeys(key for log in logs for key in list_group_columns(str(log)))
    hint = f"there are {', '.join(there)}" if there else "the data set's other columns are stored there"
    what = " or ".join(map(repr, groups)) if groups else "a column that defines groups"
    raise UserError(f"no sample of {path} has {what} in its metadata; {hint} (--group NAME names the column)")


def _refuse_other_columns(log: Path, groups: list[str]) -> None:
    from cruijff_kit.evaluation.eval_logs import reported_groups  # inspect-ai

    told = reported_groups(str(log))
    if told is not None and not (told and {*groups} <= {*told}):
        there = f"dataset.group_columns has {', '.join(told)} (--group)" if told else "dataset.group_columns is empty"
        raise UserError(f"{log} holds red data, where only listed columns may define groups; {there}")


def _logs(path: Path) -> list[Path]:
    if path.is_file():
        return [path]

    if not (path / "result.json").is_file():
        runs = find_folders(path, "result.json")
        instead = f", for example {min(runs)}" if runs else ""
        raise UserError(f"{path} is no run; give a run's folder, an .eval log or a CSV{instead}")
    last = {e.task: Path(e.log) for e in read_result(path / "result.json").evaluation}  # of several epochs the last one
    return [log for log in last.values() if log.is_file()]


def _read_csv(path: Path, groups: list[str] | None, unit: str | None) -> GroupedSamples:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        others = groups or [c for c in header if c not in (*_COLUMNS, "INPUT")] or [_GROUP]
        lacking = [c for c in dict.fromkeys((*_COLUMNS, *others, *([unit] if unit else []))) if c not in header]
        if lacking:
            there = ", ".join(quote_names(header)) or WITHHELD
            raise UserError(
                f"{path} has no column {', '.join(lacking)}; it has {there} (--group names the group column)"
            )
        read = [(_csv_row(cells, f"{path}, line {reader.line_num}", unit), cells) for cells in reader]
    columns = {c: [replace(row, group=cells[c]) for row, cells in read if cells[c]] for c in others}
    samples = _choose(path, {c: rows for c, rows in columns.items() if rows}, groups, unit)
    if not samples.columns:
        raise UserError(f"no column of {path} defines 2 to {MOST_GROUPS} groups; --group NAME selects one")
    return _number_groups(samples) if redaction.is_enabled() else samples


def _number_groups(samples: GroupedSamples) -> GroupedSamples:
    """The rows of a CSV of red data with numbers for their groups: nobody has said that their names may be told."""
    columns = {}
    for place, (column, rows) in enumerate(samples.columns.items(), 1):
        names = {name: f"group {number}" for number, name in enumerate(sorted({r.group for r in rows}), 1)}
        title = next(iter(quote_names([column])), f"column {place}")
        columns[title] = [replace(r, group=names[r.group]) for r in rows]
    return GroupedSamples(samples.source, columns, quote_names(samples.left_out))


def _csv_row(cells: dict[str, str], where: str, unit: str | None) -> Row:
    label, prediction, share = ((cells[c] or "").strip() for c in _COLUMNS)
    try:
        positive, p = {0.0: False, 1.0: True}[float(label)], float(share)
    except (ValueError, KeyError):
        said = f"TRUE_LABEL {quote(label)} must be 0 or 1, P(TRUE LABEL) {quote(share)} a number"
        raise UserError(f"{where}: {said}") from None
    if not 0 <= p <= 1:
        raise UserError(f"{where}: P(TRUE LABEL) {quote(p)} must be in [0, 1]")
    try:
        predicted = float(prediction)
    except ValueError:  # an answer that is neither label is wrong
        predicted = None
    return Row(
        "", float(predicted == float(label)), positive, p if positive else 1 - p, float(predicted == 1),
        unit=cells[unit] or None if unit else None, sample=where,
    )  # fmt: skip
