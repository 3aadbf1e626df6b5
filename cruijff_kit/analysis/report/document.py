"""What a report is built of (sections of text, tables and charts), and how it is written: page, figures, data.

Whoever wants a section writes a function Runs -> Section and names it in analysis/report/build.py.
"""

import csv
import io
import math
from dataclasses import astuple, dataclass, field, fields
from typing import Any


@dataclass
class Table:
    """Numbers as rows."""

    name: str
    """Of its CSV file."""
    caption: str
    columns: list[str]
    """The header."""
    rows: list[list[Any]]
    """Values; None where there is none."""
    marked: set[int] = field(default_factory=set)
    """Numbers of the rows that stand out (the best run)."""

    def cells(self) -> list[list[dict[str, Any]]]:
        """What the page shows: text, the number that it is sorted by, and whether it is a number."""
        return [[_cell(value) for value in row] for row in self.rows]

    def csv(self) -> str:
        """The values, all digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if _missing(v) else v for v in row] for row in self.rows])
        return text.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """Rows for JSON, column -> value."""
        return [dict(zip(self.columns, [None if _missing(v) else v for v in r], strict=True)) for r in self.rows]


@dataclass
class Chart:
    """A figure."""

    name: str
    caption: str
    alt: str
    """What it shows, in words."""
    svg: str
    """For the page."""
    png: bytes
    """For a slide."""
    width: int
    data: Table
    """For drawing it anew."""


@dataclass
class Sample:
    """A sample as the page shows it."""

    run: str
    task: str
    right: bool | None
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
    """Why there is nothing to show; the end of the page says only that."""

    @property
    def tables(self) -> list[Table]:
        """Every table with data: those shown, those behind charts, and the samples."""
        tables = [b.data if isinstance(b, Chart) else b for b in self.blocks]
        if self.samples:
            columns = [f.name for f in fields(Sample)]
            tables.append(Table("samples", self.title, columns, [[*astuple(s)] for s in self.samples]))
        return tables

    @property
    def charts(self) -> list[Chart]:
        """Its figures."""
        return [b for b in self.blocks if isinstance(b, Chart)]


def _missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and not math.isfinite(value)


def _cell(value: Any) -> dict[str, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = "" if _missing(value) else shown(value)
    return {"text": text, "number": number, "sort": repr(value) if number and not _missing(value) else text}


def shown(value: Any) -> str:
    """A value as people read it: four digits, no exponent where it is not needed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.3g}"


def plain(value: Any) -> Any:
    """A setting's value as tables and axes have it: lists as "a+b", as in the names of runs; true and false as typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(str(plain(v)) for v in value) or "none"
    return value if isinstance(value, int | float | str) or value is None else str(value)


def several(number: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(texts: list[str], last: str = "and") -> str:
    """a, b and c."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}" if texts else ""
