"""Results of finished runs as a table in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit.analysis.sweep import analyse
from cruijff_kit.analysis.table_cells import (
    INTERVALS,
    SEEDS,
    VERSUS,
    base_model_line,
    lines_below,
    seed_cells,
    table_cells,
    versus_cells,
)
from cruijff_kit.records.result import RunResult, red_data_notice
from cruijff_kit.util import json_output

if TYPE_CHECKING:
    from rich.table import Table
from cruijff_kit.analysis.results_frame import list_unfinished_runs, read_results, to_dict


def _of_several_epochs(results: list[RunResult]) -> str:
    several = any(len({e.epoch for e in r.evaluation}) > 1 for r in results)
    return "the last evaluated epoch is shown; --epochs shows each" if several else ""


def _rich(header: list[str], rows: list[list[str]], styles: list[str] | None = None, broken: bool = False) -> "Table":
    """A table without lines between columns; broken: the headers at spaces."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    texts = ("run", "configuration", "status", "scores", "seeds", "")
    for name in header:
        left = name in texts or name.startswith("versus")
        table.add_column(name.replace(" ", "\n") if broken else name, overflow="fold",
                         justify="left" if left else "right")  # fmt: skip
    for cells, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(Text, cells), style=style)
    return table


def show_results(folder: Path, results: list[RunResult] | None = None) -> None:
    """Print the table of a folder's runs, best run marked, failures with their reasons.

    Args:
        folder: the title; read unless `results` has been.
        results: the runs to show.
    Raises:
        UserError: as read_results.
    """
    from rich.console import Console

    results = results or read_results(folder)
    analysis = analyse(results)
    console = Console(width=_width(), highlight=False)
    console.print(str(folder), style="italic", markup=False, soft_wrap=True)
    styles = ["bold" if analysis.is_best(r) else "red" if r.status == "failed" else "" for r in results]
    table = _rich(*table_cells(results, analysis), styles)
    below = [INTERVALS] if any(r.evaluation for r in results) else []
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table = _rich(*table_cells(results, analysis, narrow=True), styles, broken=True)
        below.append(base_model_line(results, analysis))
    console.print(table)
    for line in (*below, *lines_below(results, analysis), _of_several_epochs(results), red_data_notice(results)):
        if line:
            console.print(line, markup=False)
    if versus := versus_cells(analysis):
        console.print(f"\n{VERSUS}", markup=False)
        console.print(_rich(*versus))
    if seeds := seed_cells(analysis):
        console.print(f"\n{SEEDS}", markup=False)
        console.print(_rich(*seeds))
    if missing := list_unfinished_runs(folder):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        console.print(f"{len(missing)} runs have no result ({some}): cruijff-kit status {folder}", markup=False)
    for r in results:
        if r.error:
            console.print(f"{r.name} {r.status} in {r.error.phase}: {r.error.type}: {r.error.message}", markup=False)
        if r.posthoc_error:
            why = f"{r.posthoc_error.type}: {r.posthoc_error.message}"
            console.print(f"{r.name}: a later evaluation is missing: {why}", markup=False)


def record_or_show(folder: Path, results: list[RunResult] | None = None) -> None:
    """Record the results for the command's JSON document, or, where none is wanted, print their table."""
    if json_output.is_enabled():
        json_output.record(folder=str(folder.absolute()), **to_dict(results or read_results(folder)))
    else:
        show_results(folder, results)


def _width() -> int | None:
    """Columns; None: the terminal's. What goes to a file or another program needs no terminal's width."""
    return None if sys.stdout.isatty() else 200
