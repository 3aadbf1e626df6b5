"""The samples of a run, an .eval log or a CSV, for each column that defines groups (`subgroups`)."""

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
    """Columns that the user did not name and that define no groups: one value, too many, or nearly one for each sample."""


def read_samples(path: Path, groups: list[str] | None = None, unit: str | None = None) -> GroupedSamples:
    """Read the samples of a CSV, a log or a run.

    Args:
        path: the file, or the run's folder.
        groups: columns of the CSV, or keys of the samples' metadata; None: all that define groups.
        unit: the column or key that names the samples' unit; None: the one that the log names, in a CSV none.
    Raises:
        UserError: there is no such file or group, or a cell cannot be read.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() == ".csv":
        enable_redaction_for(find_tier(path))
        return _read_csv(path, groups, unit)
    logs = _list_logs(path)
    for log in logs:
        _check_red_columns(log, groups or [])
    candidates = [samples for log in logs if (samples := read_logs([log], groups, unit)).columns]
    if len(candidates) > 1:
        first = min(s.source for s in candidates)
        raise UserError(f"{path} holds several logs with groups; give one, for example {first}")
    if not candidates:
        _raise_no_groups(path, logs, groups)
    if not are_shares(candidates[0].columns):
        raise UserError(
            f"the scores of {candidates[0].source} are numbers; groups are compared by accuracy, which needs right or "
            "wrong"
        )
    return candidates[0]


def read_logs(logs: Sequence[Path], groups: list[str] | None = None, unit: str | None = None) -> GroupedSamples:
    """Read the samples of the logs of one configuration (one for each seed), each sample once (`pool`).

    Args:
        logs: the .eval files.
        groups, unit: as for `read_samples`; for red data the caller checks that they may be shown.
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
    named_unit, unit = unit, unit or unit_column(first)
    allowed = reported_groups(first)
    log_group = [_LOG_GROUP] if allowed is None or _LOG_GROUP in allowed else []
    names = groups or [*dict.fromkeys([*list_group_columns(first), *log_group])]
    tables = [read_group_rows(str(log), names, unit) for log in logs]
    columns = {name: pool([[Row(**row) for row in rows[name]] for rows in tables]) for name in names}
    columns = {name: rows for name, rows in columns.items() if rows}
    if named_unit and columns and all(row.unit is None for rows in columns.values() for row in rows):
        raise UserError(f"no sample of {first} has {named_unit!r} in its metadata (--unit NAME names the respondent)")
    return _select_columns(logs[0], columns, groups, unit)


def are_shares(columns: Mapping[str, Sequence[Row]]) -> bool:
    """Return whether all scores are between 0 (wrong) and 1 (right); other scores are distances, which have no accuracy."""
    return all(0 <= row.correct <= 1 for rows in columns.values() for row in rows)


def _select_columns(
    source: Path, columns: dict[str, list[Row]], groups: list[str] | None, unit: str | None
) -> GroupedSamples:
    """Select the columns that the user named, otherwise those that define groups."""
    if groups:
        return GroupedSamples(source, columns)

    def has_groups(column: str, rows: list[Row]) -> bool:
        number = len({row.group for row in rows})
        return column in (_GROUP, _LOG_GROUP) or column != unit and 1 < number <= min(MOST_GROUPS, len(rows) / 2)

    selection = {column: rows for column, rows in columns.items() if has_groups(column, rows)}
    return GroupedSamples(source, selection, [column for column in columns if column not in selection])


def _raise_no_groups(path: Path, logs: list[Path], groups: list[str] | None) -> NoReturn:
    from cruijff_kit.evaluation.eval_logs import list_group_columns  # inspect-ai

    keys = dict.fromkeys(key for log in logs for key in list_group_columns(str(log)))
    hint = f"there are {', '.join(keys)}" if keys else "the data set's other columns are stored there"
    names = " or ".join(map(repr, groups)) if groups else "a column that defines groups"
    raise UserError(f"no sample of {path} has {names} in its metadata; {hint} (--group NAME names the column)")


def _check_red_columns(log: Path, groups: list[str]) -> None:
    """Raise a UserError if the log holds red data, and a group is not among the columns that may be reported."""
    from cruijff_kit.evaluation.eval_logs import reported_groups  # inspect-ai

    allowed = reported_groups(str(log))
    if allowed is not None and not (allowed and {*groups} <= {*allowed}):
        hint = "dataset.group_columns is empty"
        if allowed:
            hint = f"dataset.group_columns has {', '.join(allowed)} (--group)"
        raise UserError(f"{log} holds red data, where only listed columns may define groups; {hint}")


def _list_logs(path: Path) -> list[Path]:
    if path.is_file():
        return [path]

    if not (path / "result.json").is_file():
        runs = find_folders(path, "result.json")
        example = f", for example {min(runs)}" if runs else ""
        raise UserError(f"{path} is no run; give a run's folder, an .eval log or a CSV{example}")
    logs = {e.task: Path(e.log) for e in read_result(path / "result.json").evaluation}  # each task in its last epoch
    return [log for log in logs.values() if log.is_file()]


def _read_csv(path: Path, groups: list[str] | None, unit: str | None) -> GroupedSamples:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        group_columns = groups or [c for c in header if c not in (*_COLUMNS, "INPUT")] or [_GROUP]
        needed = dict.fromkeys((*_COLUMNS, *group_columns, *([unit] if unit else [])))
        missing = [c for c in needed if c not in header]
        if missing:
            names = ", ".join(quote_names(header)) or WITHHELD
            raise UserError(
                f"{path} has no column {', '.join(missing)}; it has {names} (--group names the group column)"
            )
        lines = [(_parse_row(cells, f"{path}, line {reader.line_num}", unit), cells) for cells in reader]
    columns = {c: [replace(row, group=cells[c]) for row, cells in lines if cells[c]] for c in group_columns}
    samples = _select_columns(path, {c: rows for c, rows in columns.items() if rows}, groups, unit)
    if not samples.columns:
        raise UserError(f"no column of {path} defines 2 to {MOST_GROUPS} groups; --group NAME selects one")
    return _number_groups(samples) if redaction.is_enabled() else samples


def _number_groups(samples: GroupedSamples) -> GroupedSamples:
    """Replace the groups of a CSV of red data by numbers, because nobody has permitted to show their names."""
    columns = {}
    for position, (column, rows) in enumerate(samples.columns.items(), 1):
        names = {name: f"group {number}" for number, name in enumerate(sorted({r.group for r in rows}), 1)}
        title = next(iter(quote_names([column])), f"column {position}")
        columns[title] = [replace(r, group=names[r.group]) for r in rows]
    return GroupedSamples(samples.source, columns, quote_names(samples.left_out))


def _parse_row(cells: dict[str, str], where: str, unit: str | None) -> Row:
    label, prediction, share = ((cells[c] or "").strip() for c in _COLUMNS)
    try:
        positive, p = {0.0: False, 1.0: True}[float(label)], float(share)
    except (ValueError, KeyError):
        rule = f"TRUE_LABEL {quote(label)} must be 0 or 1, P(TRUE LABEL) {quote(share)} a number"
        raise UserError(f"{where}: {rule}") from None
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
