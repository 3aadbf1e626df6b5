"""The parts of a report: sections of text, tables and charts; and the text and CSV of values.

To add a section, write a function Runs -> Section and add it to SECTION_BUILDERS in analysis/report/build.py.
"""

import csv
import io
import math
from dataclasses import astuple, dataclass, field, fields
from typing import Any


@dataclass
class Table:
    """A table of values."""

    name: str
    """Stem of its CSV file."""
    caption: str
    columns: list[str]
    """The header."""
    rows: list[list[Any]]
    """Values, one for each column; None: no value."""
    highlights: set[int] = field(default_factory=set)
    """Numbers of the rows that the page highlights (the best run)."""

    def cells(self) -> list[list[dict[str, Any]]]:
        """Return the cells of the page: text, whether it is a number, and the key of sorting."""
        return [[_make_cell(value) for value in row] for row in self.rows]

    def csv(self) -> str:
        """Return the values as CSV, with all digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if _is_missing(v) else v for v in row] for row in self.rows])
        return text.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """Return the rows for JSON, column -> value."""
        return [dict(zip(self.columns, [None if _is_missing(v) else v for v in r], strict=True)) for r in self.rows]


@dataclass
class Chart:
    """A figure."""

    name: str
    caption: str
    alt: str
    """Text alternative (WCAG 2.1, 1.1.1)."""
    svg: str
    """For the page."""
    png: bytes
    """For slides."""
    width: int
    """Width in CSS pixels."""
    data: Table
    """The numbers in the figure."""


@dataclass
class Sample:
    """A sample as the page shows it."""

    run: str
    task: str
    right: bool | None
    """Whether the answer is correct; None: scored as a number."""
    prompt: str
    target: str
    answer: str
    score: str


@dataclass
class Section:
    """A part of the report."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    blocks: list[Table | Chart] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    absent: str = ""
    """Why the section is empty; the end of the page gives this reason."""

    @property
    def tables(self) -> list[Table]:
        """Return every table: those on the page, the data of the charts, and the samples."""
        tables = [b.data if isinstance(b, Chart) else b for b in self.blocks]
        if self.samples:
            columns = [f.name for f in fields(Sample)]
            tables.append(Table("samples", self.title, columns, [[*astuple(s)] for s in self.samples]))
        return tables

    @property
    def charts(self) -> list[Chart]:
        """Return the figures."""
        return [b for b in self.blocks if isinstance(b, Chart)]


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and not math.isfinite(value)


def _make_cell(value: Any) -> dict[str, Any]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = "" if _is_missing(value) else format_value(value)
    return {"text": text, "number": is_number, "sort": repr(value) if is_number and not _is_missing(value) else text}


def format_value(value: Any) -> str:
    """Format a value for people: four significant digits, an exponent only for very small and very large numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.3g}"


def plain_value(value: Any) -> Any:
    """Return a setting's value for tables and axes: lists as "a+b", as in names of runs; "true" and "false" as in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(str(plain_value(v)) for v in value) or "none"
    return value if isinstance(value, int | float | str) or value is None else str(value)


def format_count(number: int, noun: str) -> str:
    """Format a count: 1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def join_words(words: list[str], conjunction: str = "and") -> str:
    """Join words: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}" if words else ""
