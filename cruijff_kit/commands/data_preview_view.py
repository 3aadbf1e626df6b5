"""Print the report of `data_preview.preview`: target tokens in colour, or between ⟦ and ⟧ without colour."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cruijff_kit.data.tiers import RED

_TARGET, _MASKED = ("bold green", "bold dark_green"), ("grey62", "grey42")  # alternating, so that tokens are distinct
_OPEN, _CLOSE = "⟦", "⟧"


def print_report(report: dict[str, Any]) -> None:
    """Print the report of `data_preview.preview`."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    is_coloured = console.color_system is not None
    for row in report["rows"]:
        cut = f", {row['cut']} more are truncated" if row["cut"] else ""
        title = f"{row['split']} row {row['row']}: {row['length']} tokens, {row['targets']} targets{cut}"
        console.print(Text(title, style="bold"))
        console.print(_format_tokens(row["tokens"], is_coloured), soft_wrap=True)
        console.print()
    if report["rows"]:
        legend = Text("green", style=_TARGET[0]) if is_coloured else Text(f"between {_OPEN} and {_CLOSE}")
        console.print(Text("Target tokens (with a loss) are ").append_text(legend).append("; ↵ is a line break.\n"))
    if report["tier"] == RED:
        console.print("red data: rows and answers are withheld\n")
    console.print(_make_length_table(report["splits"]))
    _print_answers(report["splits"], console)
    for line in _list_remarks(report):
        console.print(Text(line), soft_wrap=True)


def _format_tokens(tokens: list[dict[str, Any]], is_coloured: bool) -> Text:
    text, is_target = Text(), False
    for number, token in enumerate(tokens):
        if not is_coloured and token["target"] != is_target:
            text.append(_OPEN if token["target"] else _CLOSE)
        is_target = token["target"]
        style = (_TARGET if is_target else _MASKED)[number % 2] if is_coloured else ""
        text.append(token["text"].replace("\n", "↵\n"), style=style)
    return text.append(_CLOSE) if is_target and not is_coloured else text


def _make_length_table(splits: dict[str, Any]) -> Table:
    table = Table("split", title="tokens of a row", title_justify="left")
    has_packs = any("packs" in s for s in splits.values())
    columns = (
        "rows",
        "shortest",
        "median",
        "95%",
        "longest",
        "target tokens",
        "rows truncated",
        *["packs"] * has_packs,
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, s in splits.items():
        cells = [s["rows"], *s["tokens"].values(), s["target_tokens"], s["cut_rows"], *[s.get("packs", "")] * has_packs]
        table.add_row(name, *map(str, cells))
    return table


def _print_answers(splits: dict[str, Any], console: Console) -> None:
    """Print each answer with its share of each split if there are few answers, otherwise their number."""
    answers = dict.fromkeys(a for s in splits.values() for a in s["answers"])
    is_complete = all(s["different_answers"] == len(s["answers"]) for s in splits.values())
    if not is_complete or 2 * len(answers) > sum(s["rows"] for s in splits.values()):
        shares = [f"{name} {s['different_answers']} in {s['rows']} rows" for name, s in splits.items()]
        console.print(Text(f"different answers: {', '.join(shares)}"))
        return
    table = Table("answer", *splits, title="answers", title_justify="left")
    for answer in answers:
        counts = [s["answers"].get(answer, 0) for s in splits.values()]
        label = answer if len(answer) <= 40 else answer[:37] + "..."
        cells = [f"{n} ({n / s['rows']:.0%})" for n, s in zip(counts, splits.values(), strict=True)]
        table.add_row(Text(label.replace("\n", "↵")), *cells)
    console.print(table)


def _list_remarks(report: dict[str, Any]) -> list[str]:
    lines = [f"{leak['kind']}: {leak['says']}" for leak in report["leaks"]]
    if not lines:
        lines.append("no prompt occurs twice, within a split or across splits")
    for split, rows in report["targets_in_prompts"].items():
        if rows:
            total = report["splits"][split]["rows"]
            where = f"{len(rows)} of {total} rows of split {split!r}"
            lines.append(f"in {where} the prompt contains the answer (first: row {rows[0]})")
    if report["unused_columns"]:
        lines.append(f"columns that the model does not see: {', '.join(report['unused_columns'])}")
    return lines
