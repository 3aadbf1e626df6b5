"""Results of finished runs as a table in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit.analysis.results_frame import list_unfinished_runs, read_results, to_dict
from cruijff_kit.analysis.sweep import analyse
from cruijff_kit.analysis.table_cells import (
    INTERVALS,
    SEEDS,
    VERSUS,
    describe_base_model,
    list_table_notes,
    make_comparison_cells,
    make_result_cells,
    make_seed_cells,
)
from cruijff_kit.records.result import RunResult, red_data_notice
from cruijff_kit.util import json_output

if TYPE_CHECKING:
    from rich.table import Table


def _describe_epochs(results: list[RunResult]) -> str:
    has_epochs = any(len({e.epoch for e in r.evaluation}) > 1 for r in results)
    return "the last evaluated epoch is shown; --epochs shows each" if has_epochs else ""


def _make_table(
    header: list[str], rows: list[list[str]], styles: list[str] | None = None, has_short_lines: bool = False
) -> "Table":
    """Make a table without lines between columns.

    Args:
        header: names of the columns.
        rows: cells of each row.
        styles: rich style of each row; None: none.
        has_short_lines: whether to break the names of columns at spaces.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    texts = ("run", "configuration", "status", "scores", "seeds", "")
    for name in header:
        is_text = name in texts or name.startswith("versus")
        table.add_column(name.replace(" ", "\n") if has_short_lines else name, overflow="fold",
                         justify="left" if is_text else "right")  # fmt: skip
    for cells, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(Text, cells), style=style)
    return table


def show_results(folder: Path, results: list[RunResult] | None = None) -> None:
    """Print the table of a folder's runs, with stars at the best runs, and the reasons of failures.

    Args:
        folder: the title of the table.
        results: the runs to show; None: those of the folder.
    Raises:
        UserError: as for read_results.
    """
    from rich.console import Console

    results = results or read_results(folder)
    analysis = analyse(results)
    console = Console(width=_console_width(), highlight=False)
    console.print(str(folder), style="italic", markup=False, soft_wrap=True)
    styles = ["bold" if analysis.is_best(r) else "red" if r.status == "failed" else "" for r in results]
    table = _make_table(*make_result_cells(results, analysis), styles)
    notes = [INTERVALS] if any(r.evaluation for r in results) else []
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table = _make_table(*make_result_cells(results, analysis, narrow=True), styles, has_short_lines=True)
        notes.append(describe_base_model(results, analysis))
    console.print(table)
    notes += [*list_table_notes(results, analysis), _describe_epochs(results), red_data_notice(results)]
    for line in notes:
        if line:
            console.print(line, markup=False)
    if comparisons := make_comparison_cells(analysis):
        console.print(f"\n{VERSUS}", markup=False)
        console.print(_make_table(*comparisons))
    if seeds := make_seed_cells(analysis):
        console.print(f"\n{SEEDS}", markup=False)
        console.print(_make_table(*seeds))
    if names := list_unfinished_runs(folder):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        console.print(f"{len(names)} runs have no result ({shown}): cruijff-kit status {folder}", markup=False)
    for r in results:
        if r.error:
            console.print(f"{r.name} {r.status} in {r.error.phase}: {r.error.type}: {r.error.message}", markup=False)
        if r.posthoc_error:
            reason = f"{r.posthoc_error.type}: {r.posthoc_error.message}"
            console.print(f"{r.name}: a later evaluation is missing: {reason}", markup=False)


def record_or_show(folder: Path, results: list[RunResult] | None = None) -> None:
    """Record the results for the command's JSON output, or without --json print their table."""
    if json_output.is_enabled():
        json_output.record(folder=str(folder.absolute()), **to_dict(results or read_results(folder)))
    else:
        show_results(folder, results)


def _console_width() -> int | None:
    """Return the number of columns; None: that of the terminal. A file or another program is not limited by a terminal."""
    return None if sys.stdout.isatty() else 200
