"""Rows that should not meet: prompts that stand twice, in one split or in two, and answers that stand in the prompt.

exact   the same prompt, letter for letter. Across two splits it stops a run unless dataset.allow_leaks names it
near    longer prompts that share most of their words in a row; across two splits a run warns of it. What many rows share
        (a template, the words of a questionnaire) does not count, and prompts with little of their own are left out

No torch; numpy where there are longer prompts. 100,000 rows of 50 words take some seconds.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cruijff_kit.data.conversations import Conversation, conversations
from cruijff_kit.data.near import near_pairs
from cruijff_kit.errors import UserError
from cruijff_kit.withheld import quoted

if TYPE_CHECKING:
    from cruijff_kit.config import DatasetConfig

_SHORTEST_TARGET = 3  # letters; a shorter answer (a digit, a yes) stands in many prompts without giving anything away


@dataclass(frozen=True)
class Leak:
    """Rows of `second` whose prompt stands in `first` too (within a split the two are the same: a row's later copies).

    kind: exact or near. rows: how many there are. of: rows of `second`. same_answer: how many of them want the same answer.
    example: numbers of a row of `first` and one of `second`. prompt: what that row of `second` asks.
    """

    kind: str
    first: str
    second: str
    rows: int
    of: int
    same_answer: int
    example: tuple[int, int]
    prompt: str

    @property
    def across(self) -> bool:
        """Whether two splits are concerned."""
        return self.first != self.second

    def __str__(self) -> str:
        how = "exactly" if self.kind == "exact" else "nearly"
        where = f"{self.second} row {self.example[1]}, {self.first} row {self.example[0]}"
        whose = f"what rows of {self.first!r} ask too" if self.across else "what another of its rows asks"
        return (
            f"{self.rows} of {self.of} rows of split {self.second!r} ask {how} {whose}, {self.same_answer} with the same "
            f"answer (for example {where}: {quoted(self.prompt)})"
        )


def find_leaks(splits: dict[str, list[Conversation]], within: bool = True) -> list[Leak]:
    """Every kind of repetition in and between splits, the graver first.

    Args:
        splits: the rows that are used, by split; the training split first.
        within: also look for repetitions inside a split.
    """
    found = [*_leaks("exact", splits, _exact_pairs(splits)), *_leaks("near", splits, near_pairs(splits))]
    found = [leak for leak in found if leak.across or within]
    return sorted(found, key=lambda leak: (not leak.across, leak.kind))


def targets_in_prompts(rows: list[Conversation]) -> list[int]:
    """Numbers of the rows whose answer, of three letters at least, stands as words of its own in what fills the prompt."""
    found = []
    for c in rows:
        answer = c.answer.strip()
        if len(answer) < _SHORTEST_TARGET or not any(answer in v for v in c.values):
            continue
        if any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", v) for v in c.values):
            found.append(c.row)
    return found


def used_splits(data: "DatasetConfig", tests: list[str]) -> dict[str, list[Conversation]]:
    """The rows that a run uses, by split, the training split first.

    Args:
        data: the data set and what is used of it.
        tests: splits that evaluation asks.
    Raises:
        UserError: malformed data.
    """
    limits = {data.train_split: data.max_samples}
    if data.validation_split is not None:
        limits.setdefault(data.validation_split, data.max_validation_samples)
    for split in tests:
        limits.setdefault(split, data.max_test_samples)
    how = {"format": data.format, "split_column": data.split_column, "type": data.type, "sample_seed": data.sample_seed}
    asked = (data.column_map, data.prompt, data.system_prompt)
    return {split: conversations(data.path, split, *asked, limit, **how) for split, limit in limits.items()}


@dataclass(frozen=True)
class Checked:
    """What a run's data came to: leaks between its splits, and how many rows of a split hold their answer in the prompt."""

    leaks: list[Leak]
    targets: dict[str, int]

    def counts(self) -> dict[str, int]:
        """Rows by what is the matter with them, where there are any: "exact train test", "target train"."""
        found = {f"{leak.kind} {leak.first} {leak.second}": leak.rows for leak in self.leaks}
        return found | {f"target {split}": count for split, count in self.targets.items() if count}


_checked: dict[str, Checked] = {}


def check_leaks(data: "DatasetConfig", tests: list[str], data_hash: str) -> Checked:
    """Look for leaks in what a run uses; once per process for the same data.

    Args:
        data: the data set and what is used of it.
        tests: splits that evaluation asks.
        data_hash: of the data set's files.
    Raises:
        UserError: there are exact ones, and dataset.allow_leaks does not name them.
    """
    settings = dataclasses.asdict(data)
    del settings["allow_leaks"]
    key = json.dumps([settings, tests, data_hash], sort_keys=True, default=str)
    if key not in _checked:
        used = used_splits(data, tests)
        targets = {split: len(targets_in_prompts(rows)) for split, rows in used.items()}
        _checked[key] = Checked(find_leaks(used, within=False), targets)
    if "exact" not in data.allow_leaks:
        _refuse_exact(data, tests, _checked[key].leaks)
    return _checked[key]


def _refuse_exact(data: "DatasetConfig", tests: list[str], leaks: list[Leak]) -> None:
    held_out = {split: "eval.tasks: split " if split != data.test_split else "dataset.test_split=" for split in tests}
    for split, name in ({data.validation_split: "dataset.validation_split="} | held_out).items():
        if split == data.train_split:
            raise UserError(
                f"{name}{split} is what is trained on; choose another, or allow it on purpose: "
                "dataset.allow_leaks=[exact]"
            )
    for leak in leaks:
        if leak.kind == "exact":
            raise UserError(f"{leak}; take them out of one of the two, or allow it: dataset.allow_leaks=[exact]")


def _exact_pairs(splits: dict[str, list[Conversation]]) -> Iterator[tuple[str, Conversation, str, Conversation]]:
    """(split, row, later split, row) with the same prompt; each row with the first one of each split before."""
    seen: dict[str, dict[str, Conversation]] = {}
    for split, rows in splits.items():
        for c in rows:
            asked = "\x1f".join(m["content"] for m in c.messages)
            holders = seen.setdefault(asked, {})
            for holder, earlier in holders.items():
                yield holder, earlier, split, c
            holders.setdefault(split, c)


def _leaks(kind: str, splits: dict[str, list[Conversation]], pairs) -> Iterator[Leak]:
    rows: Counter[tuple[str, str]] = Counter()
    alike: Counter[tuple[str, str]] = Counter()
    examples = {}
    counted = set()
    for first, a, second, b in pairs:
        if (first, second, b.row) in counted:
            continue
        counted.add((first, second, b.row))
        rows[first, second] += 1
        alike[first, second] += a.answer == b.answer
        examples.setdefault((first, second), (a, b))
    for (first, second), count in rows.items():
        a, b = examples[first, second]
        prompt = " ".join(b.messages[-1]["content"].split())
        shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        yield Leak(kind, first, second, count, len(splits[second]), alike[first, second], (a.row, b.row), shown)
