"""The states of runs as a table, printed once or updated until the runs end."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states
from cruijff_kit.util import json_output
from cruijff_kit.util.format import format_clock
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from rich.console import RenderableType


_COLOURS = {"done": "green", "failed": "red", "cancelled": "red", "running": "cyan", "evaluating": "cyan"}


POLL_SECONDS = 3.0


_WIDE = 130  # terminal width from which on the reasons fit into the table


def make_status_table(title: str, infos: list[RunInfo], trouble: str | None, width: int) -> "RenderableType":
    """Make the table of the states of runs, with the number of runs in each state.

    Args:
        title: of the table.
        infos: a row each.
        trouble: why SLURM does not answer; None: it does.
        width: of the terminal; in a narrow one reasons are below the table, and empty columns are omitted.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    is_narrow = width < _WIDE
    rows = [_make_cells(v) for v in infos]
    columns = [c for c in rows[0] if not is_narrow or (c != "reason" and any(row[c] for row in rows))]
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in ("step", "loss", "elapsed", "left") else "left"
        table.add_column(column, overflow="fold", justify=justify, no_wrap=column not in ("run", "reason"))
    for info, row in zip(infos, rows, strict=True):
        table.add_row(*(Text(row[c]) for c in columns), style=_COLOURS.get(info.state))
    counts = Counter(v.state for v in infos)
    lines = [Text(f"{row['run']}: {row['reason']}") for row in rows if is_narrow and row["reason"]]
    lines.append(
        Text(f"{len(infos)} run{'s' * (len(infos) != 1)}: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    )
    if trouble:
        lines.append(Text(f"SLURM does not answer; the runs last reported: {trouble}", style="yellow"))
    return Group(table, *lines)


def _make_cells(v: RunInfo) -> dict[str, str]:
    return {
        "run": v.name,
        "state": v.state,
        "epoch": _format_progress(v.epoch, v.epochs, 1),
        "step": _format_progress(v.step, v.total_steps),
        "loss": "" if v.loss is None else f"{v.loss:.4g}",
        "elapsed": _format_seconds(v.elapsed),
        "left": _format_seconds(v.left),
        "node": v.node or "",
        "job": v.job_id or "",
        "reason": _format_reason(v),
    }


def _format_progress(number: int | None, total: int | None, first: int = 0) -> str:
    return "" if number is None else f"{min(number + first, total or number + first)}/{total or '?'}"


def _format_seconds(seconds: float | None) -> str:
    return "" if seconds is None else format_clock(int(seconds))


def _format_reason(info: RunInfo) -> str:
    restarts = f"restarted {info.restarts} time{'s' * (info.restarts > 1)}" if info.restarts else None
    changes = ", ".join(f"{k}={v}" for k, v in info.changes.items()) or None
    return "; ".join(filter(None, [info.reason, restarts, changes, *info.notes]))


def watch(title: str, runs: list[RunRef], until: Callable[[list[RunInfo]], bool]) -> list[RunInfo]:
    """Show the states every few seconds until a condition holds.

    In a terminal the table is updated in place; otherwise the counts are printed whenever they change.

    Args:
        title: of the table.
        runs: the runs to watch.
        until: whether to stop, given the states.

    Returns:
        The last states.
    """
    if sys.stdout.isatty() and not json_output.is_enabled():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            while True:
                infos, trouble = collect_states(runs)
                live.update(make_status_table(title, infos, trouble, live.console.width), refresh=True)
                if until(infos):
                    return infos
                time.sleep(POLL_SECONDS)
    last_counts = None
    while True:
        infos, trouble = collect_states(runs)
        counts = Counter(v.state for v in infos)
        if counts != last_counts:
            last_counts = counts
            say(", ".join(f"{n} {state}" for state, n in counts.items()) + (f" ({trouble})" if trouble else ""))
        if until(infos):
            return infos
        time.sleep(POLL_SECONDS)


def have_ended(infos: list[RunInfo]) -> bool:
    """Return whether every run has ended."""
    return not any(v.state in ACTIVE for v in infos)
