"""Print the report of `preview`: learnt tokens in colour, or between ⟦ and ⟧ without colour."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cruijff_kit.data.tiers import RED

_LEARNT, _MASKED = ("bold green", "bold dark_green"), ("grey62", "grey42")  # in turns, so that tokens can be told apart
_OPEN, _CLOSE = "⟦", "⟧"


def show(report: dict[str, Any]) -> None:
    """Print the report of `preview.preview`."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    coloured = console.color_system is not None
    for row in report["rows"]:
        cut = f", {row['cut']} more are truncated" if row["cut"] else ""
        title = f"{row['split']} row {row['row']}: {row['length']} tokens, {row['learnt']} learnt{cut}"
        console.print(Text(title, style="bold"))
        console.print(_tokens(row["tokens"], coloured), soft_wrap=True)
        console.print()
    if report["rows"]:
        learnt = Text("green", style=_LEARNT[0]) if coloured else Text(f"between {_OPEN} and {_CLOSE}")
        console.print(
            Text("Learnt is what is ").append_text(learnt).append("; the rest is only read. ↵ is a line break.\n")
        )
    if report["tier"] == RED:
        console.print("red data: rows and answers are withheld\n")
    console.print(_lengths(report["splits"]))
    _show_answers(report["splits"], console)
    for line in _remarks(report):
        console.print(Text(line), soft_wrap=True)


def _tokens(tokens: list[dict[str, Any]], coloured: bool) -> Text:
    text, learning = Text(), False
    for number, token in enumerate(tokens):
        if not coloured and token["learnt"] != learning:
            text.append(_OPEN if token["learnt"] else _CLOSE)
        learning = token["learnt"]
        style = (_LEARNT if learning else _MASKED)[number % 2] if coloured else ""
        text.append(token["text"].replace("\n", "↵\n"), style=style)
    return text.append(_CLOSE) if learning and not coloured else text


def _lengths(splits: dict[str, Any]) -> Table:
    table = Table("split", title="tokens of a row", title_justify="left")
    packs = any("packs" in s for s in splits.values())
    for column in ("rows", "shortest", "median", "95%", "longest", "learnt, all rows", "rows cut", *["packs"] * packs):
        table.add_column(column, justify="right")
    for name, s in splits.items():
        cells = [s["rows"], *s["tokens"].values(), s["learnt_tokens"], s["cut_rows"], *[s.get("packs", "")] * packs]
        table.add_row(name, *map(str, cells))
    return table


def _show_answers(splits: dict[str, Any], console: Console) -> None:
    """Every answer with its share of each split where there are few; else how many there are."""
    answers = dict.fromkeys(a for s in splits.values() for a in s["answers"])
    whole = all(s["different_answers"] == len(s["answers"]) for s in splits.values())
    if not whole or 2 * len(answers) > sum(s["rows"] for s in splits.values()):
        shares = [f"{name} {s['different_answers']} in {s['rows']} rows" for name, s in splits.items()]
        console.print(Text(f"different answers: {', '.join(shares)}"))
        return
    table = Table("answer", *splits, title="answers", title_justify="left")
    for answer in answers:
        counts = [s["answers"].get(answer, 0) for s in splits.values()]
        shown = answer if len(answer) <= 40 else answer[:37] + "..."
        cells = [f"{n} ({n / s['rows']:.0%})" for n, s in zip(counts, splits.values(), strict=True)]
        table.add_row(Text(shown.replace("\n", "↵")), *cells)
    console.print(table)


def _remarks(report: dict[str, Any]) -> list[str]:
    lines = [f"{leak['kind']}: {leak['says']}" for leak in report["leaks"]]
    if not lines:
        lines.append("no prompt occurs twice, within a split or across splits")
    for split, rows in report["targets_in_prompts"].items():
        if rows:
            of = report["splits"][split]["rows"]
            where = f"{len(rows)} of {of} rows of split {split!r}"
            lines.append(f"in {where} the prompt contains the answer (first: row {rows[0]})")
    if report["unused_columns"]:
        lines.append(f"columns that the model does not see: {', '.join(report['unused_columns'])}")
    return lines
