"""Find leaks: prompts that occur twice, in one split or in two, units in two splits, answers in their own prompt.

exact   the same prompt, but for case, blanks and the punctuation at its end: a model that has seen one copy has seen the
        other. Across two splits it stops a run unless dataset.allow_leaks names it
near    prompts that share most of their words, in whatever order; across two splits a run warns of it. What many rows
        share (a template, the words of a questionnaire) does not count, and prompts with fewer than four words of their
        own are left out
unit    rows of one unit (dataset.unit_column: a respondent, a household, a country) in two splits; stops a run as exact

No torch; numpy, and scipy where prompts are alike. 100,000 rows of 8 words take 3 seconds, of 50 words 10.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cruijff_kit.data.conversations import Conversation
from cruijff_kit.data.near_duplicates import Pair, find_near_duplicates, fold
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote, quote_names
from cruijff_kit.util.suggest import did_you_mean

REFUSED = ("exact", "unit")
_BY_NATURE = 1.5  # rows for each different prompt from which on repeated prompts are in the nature of the data
_SHORTEST_TARGET = 3  # letters; a shorter answer (a digit, a yes) stands in many prompts without giving anything away


@dataclass(frozen=True)
class Leak:
    """Rows of `second` that `first` holds too, in the sense of `kind`; within a split (both are the same) later copies."""

    kind: str
    """exact, near or unit."""
    first: str
    second: str
    rows: int
    """Number of leaked rows of `second`."""
    of: int
    """Rows of `second`."""
    same_answer: int
    """Number of them with the same answer as their match in `first`."""
    example: tuple[int, int]
    """Numbers of a row of `first` and one of `second`."""
    prompt: str
    """Beginning of the prompt of the example in `second`; for a unit, its name."""
    folded: int = 0
    """Number of exact leaks that differ in case, blanks or final punctuation."""
    copies: float = 1.0
    """Mean number of copies of a prompt in `first`."""
    column: str | None = None
    """Column of the unit; None for other kinds."""

    @property
    def across(self) -> bool:
        """Whether the leak is between two splits."""
        return self.first != self.second

    def __str__(self) -> str:
        where = f"{self.second} row {self.example[1]}, {self.first} row {self.example[0]}"
        example = f"for example {where}: {quote(self.prompt)}"
        source = f"prompts of {self.first!r}" if self.across else "the prompt of another of its rows"
        if self.kind == "unit":
            return (
                f"{self.rows} of {self.of} rows of split {self.second!r} belong to units of {self.first!r} "
                f"(dataset.unit_column={self.column}; {example})"
            )
        adverb = "nearly " if self.kind == "near" else "" if self.folded else "exactly "
        exception = f" ({self.folded} of them but for case, blanks or final punctuation)" if self.folded else ""
        return (
            f"{self.rows} of {self.of} rows of split {self.second!r} {adverb}repeat {source}{exception}, "
            f"{self.same_answer} with the same answer ({example})"
        )

    def advice(self) -> str:
        """Say what to do about it."""
        allow = f"dataset.allow_leaks=[{self.kind}]"
        keep = f"keep them and say so: {allow} (result.json and the methods text then name it)"
        if self.kind == "unit":
            return f"split by {self.column}, so that all rows of a unit are in one split, or {keep}"
        if self.repeats_by_nature:
            return (
                f"each different prompt stands {self.copies:.2g} times in {self.first!r}. Where that is the nature of the "
                "data (a survey of few profiles), nothing is to be taken out: put all rows of a profile or respondent "
                f"(dataset.unit_column) into one split, or {keep}. Where they are copies, take them out of one of the two"
            )
        return f"take them out of one of the two, or allow it: {allow}"

    @property
    def repeats_by_nature(self) -> bool:
        """Whether rows share few prompts, as in a survey with few profiles."""
        return self.copies >= _BY_NATURE or 2 * self.rows > self.of and self.copies > 1


def find_leaks(
    splits: dict[str, list[Conversation]], within: bool = True, unit_column: str | None = None
) -> list[Leak]:
    """Find every kind of repetition in and between splits, the graver first.

    Args:
        splits: the rows that are used, by split; the training split first.
        within: also look for repetitions inside a split.
        unit_column: the column that names each row's unit; rows of a unit may stand in one split as often as they like.
    Raises:
        UserError: a row has no unit.
    """
    exact = [pair for pair in _find_exact_pairs(splits) if within or pair[0] != pair[2]]
    known = {(first, second, row.row) for first, _, second, row in exact}
    near = (p for p in find_near_duplicates(splits, within) if (p[0], p[2], p[3].row) not in known)
    leaks = [*_count_leaks("exact", splits, exact), *_count_leaks("near", splits, near)]
    if unit_column is not None:
        leaks += _count_leaks("unit", splits, _find_unit_pairs(splits, unit_column), unit_column)
    return sorted(leaks, key=lambda leak: (not leak.across, leak.kind))


def find_unit(row: Conversation, column: str, split: str) -> str:
    """Return the unit of a row, as text.

    Raises:
        UserError: there is none.
    """
    unit = row.columns.get(column)
    if isinstance(unit, float) and unit.is_integer():  # a column of numbers with a gap elsewhere
        unit = int(unit)
    if unit is None or str(unit).strip() == "":
        names = quote_names(row.columns)
        hint = did_you_mean(column, names) if names else "there is none beside the input and the output"
        missing_column = "" if column in row.columns else f" (where there is no such column: {hint})"
        raise UserError(
            f"dataset.unit_column={column}: row {row.row} of split {split!r} has no unit; fill it in, or leave the row "
            f"out{missing_column}"
        )
    return str(unit).strip()


def find_targets_in_prompts(rows: list[Conversation]) -> list[int]:
    """Return the numbers of the rows whose answer, of at least three letters, occurs as words in the filled-in texts."""
    numbers = []
    for c in rows:
        answer = c.answer.strip()
        if len(answer) < _SHORTEST_TARGET or not any(answer in v for v in c.values):
            continue
        if any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", v) for v in c.values):
            numbers.append(c.row)
    return numbers


def _find_exact_pairs(splits: dict[str, list[Conversation]]) -> Iterator[Pair]:
    """(split, row, later split, row) with the same prompt; each row with the first one of each split before."""
    first_rows: dict[str, dict[str, Conversation]] = {}
    for split, rows in splits.items():
        for c in rows:
            written, folded = (first_rows.setdefault(key, {}) for key in _prompt_keys(c))
            yield from ((holder, earlier, split, c) for holder, earlier in (folded | written).items())
            for holders in (written, folded):
                holders.setdefault(split, c)


def _prompt_keys(c: Conversation) -> tuple[str, str]:
    """Return the keys that compare two rows: the whole prompt, and the row's own values in it, folded.

    The words of a template may stand behind the row's own, whose end would then not be the prompt's.
    """
    system = [m["content"] for m in c.messages if m["role"] == "system"]
    own = c.values or [m["content"] for m in c.messages]
    return _join_prompt(c), "folded\x1f" + "\x1f".join(map(fold, [*system, *own]))


def _join_prompt(c: Conversation) -> str:
    return "\x1f".join(m["content"] for m in c.messages)


def _find_unit_pairs(splits: dict[str, list[Conversation]], column: str) -> Iterator[Pair]:
    """(split, row, later split, row) of the same unit; each row with the first one of each split before its own."""
    first_rows: dict[str, dict[str, Conversation]] = {}
    for split, rows in splits.items():
        for c in rows:
            holders = first_rows.setdefault(find_unit(c, column, split), {})
            yield from ((holder, earlier, split, c) for holder, earlier in holders.items() if holder != split)
            holders.setdefault(split, c)


def _count_leaks(
    kind: str, splits: dict[str, list[Conversation]], pairs: Iterable[Pair], unit_column: str | None = None
) -> Iterator[Leak]:
    rows: Counter[tuple[str, str]] = Counter()
    alike: Counter[tuple[str, str]] = Counter()
    folded: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[Conversation, Conversation]] = {}
    counted = set()
    for first, a, second, b in pairs:
        if (first, second, b.row) in counted:
            continue
        counted.add((first, second, b.row))
        rows[first, second] += 1
        alike[first, second] += a.answer == b.answer
        folded[first, second] += kind == "exact" and _join_prompt(a) != _join_prompt(b)
        examples.setdefault((first, second), (a, b))
    for (first, second), count in rows.items():
        a, b = examples[first, second]
        text = b.messages[-1]["content"] if unit_column is None else find_unit(b, unit_column, second)
        prompt = " ".join(text.split())
        excerpt = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        yield Leak(
            kind, first, second, count, len(splits[second]), alike[first, second], (a.row, b.row), excerpt,
            folded[first, second], _copies(splits[first]), unit_column,
        )  # fmt: skip


def _copies(rows: list[Conversation]) -> float:
    """Return the mean number of rows per distinct prompt."""
    return len(rows) / max(1, len({_prompt_keys(c)[1] for c in rows}))
