"""Check the splits that a run uses for leaks."""

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cruijff_kit.data.conversations import Conversation, read_conversations
from cruijff_kit.util.errors import UserError

if TYPE_CHECKING:
    from cruijff_kit.config.groups import DatasetConfig
from cruijff_kit.data.leaks import REFUSED, Leak, find_leaks, find_targets_in_prompts, find_unit


def number_units(data: "DatasetConfig", split: str, limit: int | None, rows: list[int]) -> list[int]:
    """Number the units (dataset.unit_column) of these rows of a split; the numbers identify nobody.

    Raises:
        UserError: as `find_unit`.
    """
    units = {row.row: find_unit(row, data.unit_column, split) for row in _read_used(data, split, limit)}
    numbers: dict[str, int] = {}
    return [numbers.setdefault(units[row], len(numbers)) for row in rows]


def check_units(data: "DatasetConfig", splits: list[str]) -> None:
    """Raise UserError as `find_unit` if dataset.unit_column is set and a row of these test splits has no unit."""
    if data.unit_column is not None:
        for split in splits:
            for row in _read_used(data, split, data.max_test_samples):
                find_unit(row, data.unit_column, split)


def read_used_splits(data: "DatasetConfig", tests: list[str]) -> dict[str, list[Conversation]]:
    """Read the rows that a run uses, by split, the training split first.

    Args:
        data: the data set and what is used of it.
        tests: splits that the evaluation uses.
    Raises:
        UserError: malformed data.
    """
    limits = {data.train_split: data.max_samples}
    if data.validation_split is not None:
        limits.setdefault(data.validation_split, data.max_validation_samples)
    for split in tests:
        limits.setdefault(split, data.max_test_samples)
    return {split: _read_used(data, split, limit) for split, limit in limits.items()}


def _read_used(data: "DatasetConfig", split: str, limit: int | None) -> list[Conversation]:
    how: dict[str, Any] = dict(
        format=data.format, split_column=data.split_column, type=data.type, sample_seed=data.sample_seed
    )
    return read_conversations(data.path, split, data.column_map, data.prompt, data.system_prompt, limit, **how)


@dataclass(frozen=True)
class LeakReport:
    """Result of the leak check of a run's data."""

    leaks: list[Leak]
    """Leaks between its splits."""
    targets: dict[str, int]
    """Split -> rows that hold their answer in the prompt."""
    conversations: bool
    """Whether rows are whole conversations, so that no prompt template applies."""

    def counts(self) -> dict[str, int]:
        """Return kind of problem -> rows: "exact train test", "target train"."""
        counts = {f"{leak.kind} {leak.first} {leak.second}": leak.rows for leak in self.leaks}
        return counts | {f"target {split}": count for split, count in self.targets.items() if count}


_reports: dict[str, LeakReport] = {}


def check_leaks(data: "DatasetConfig", tests: list[str], data_hash: str) -> LeakReport:
    """Look for leaks in the rows that a run uses, once per process for the same data.

    Args:
        data: the data set and what is used of it.
        tests: splits that the evaluation uses.
        data_hash: of the data set's files.
    Raises:
        UserError: there are some that stop a run, and dataset.allow_leaks does not name them.
    """
    settings = dataclasses.asdict(data)
    del settings["allow_leaks"]
    key = json.dumps([settings, tests, data_hash], sort_keys=True, default=str)
    if key not in _reports:
        used = read_used_splits(data, tests)
        targets = {split: len(find_targets_in_prompts(rows)) for split, rows in used.items()}
        leaks = find_leaks(used, within=False, unit_column=data.unit_column)
        _reports[key] = LeakReport(leaks, targets, used[data.train_split][0].has_messages)
    if "exact" not in data.allow_leaks:
        _reject_training_split(data, tests)
    for leak in _reports[key].leaks:
        if leak.kind in REFUSED and leak.kind not in data.allow_leaks:
            raise UserError(f"{leak}; {leak.advice()}")
    return _reports[key]


def _reject_training_split(data: "DatasetConfig", tests: list[str]) -> None:
    held_out = {split: "eval.tasks: split " if split != data.test_split else "dataset.test_split=" for split in tests}
    for split, name in ({data.validation_split: "dataset.validation_split="} | held_out).items():
        if split == data.train_split:
            raise UserError(
                f"{name}{split} is the training split; choose another, or allow it: dataset.allow_leaks=[exact]"
            )
