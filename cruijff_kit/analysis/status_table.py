"""The state of runs as a table, once or until they end."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.run_states import Known, RunView, survey
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from rich.console import RenderableType


_COLOURS = {"done": "green", "failed": "red", "cancelled": "red", "running": "cyan", "evaluating": "cyan"}


SECONDS_BETWEEN_LOOKS = 3.0


_WIDE = 130  # columns in which the reasons have room


def status_table(title: str, views: list[RunView], trouble: str | None, width: int) -> "RenderableType":
    """The rows as people see them, and how many runs are in which state.

    Args:
        width: of the terminal; in a narrow one reasons stand below the table, and columns without content are left out.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    narrow = width < _WIDE
    rows = [_cells(v) for v in views]
    heads = [h for h in rows[0] if not narrow or (h != "reason" and any(row[h] for row in rows))]
    table = Table(title=title, title_justify="left")
    for head in heads:
        justify = "right" if head in ("step", "loss", "elapsed", "left") else "left"
        table.add_column(head, overflow="fold", justify=justify, no_wrap=head not in ("run", "reason"))
    for view, row in zip(views, rows, strict=True):
        table.add_row(*(Text(row[h]) for h in heads), style=_COLOURS.get(view.state))
    counts = Counter(v.state for v in views)
    lines = [Text(f"{row['run']}: {row['reason']}") for row in rows if narrow and row["reason"]]
    lines.append(
        Text(f"{len(views)} run{'s' * (len(views) != 1)}: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    )
    if trouble:
        lines.append(Text(f"SLURM cannot be asked, so this is what the runs said last: {trouble}", style="yellow"))
    return Group(table, *lines)


def _cells(v: RunView) -> dict[str, str]:
    return {
        "run": v.name,
        "state": v.state,
        "epoch": _of(v.epoch, v.epochs, 1),
        "step": _of(v.step, v.total_steps),
        "loss": "" if v.loss is None else f"{v.loss:.4g}",
        "elapsed": _clock(v.elapsed),
        "left": _clock(v.left),
        "node": v.node or "",
        "job": v.job_id or "",
        "reason": _reason(v),
    }


def _of(number: int | None, total: int | None, first: int = 0) -> str:
    return "" if number is None else f"{min(number + first, total or number + first)}/{total or '?'}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _reason(view: RunView) -> str:
    restarts = f"started again {view.restarts} time{'s' * (view.restarts > 1)}" if view.restarts else None
    changes = ", ".join(f"{k}={v}" for k, v in view.changes.items()) or None
    return "; ".join(filter(None, [view.reason, restarts, changes, *view.notes]))


def watch(title: str, runs: list[Known], until: Callable[[list[RunView]], bool]) -> list[RunView]:
    """Show the table, and again every few seconds, until a condition holds; in place in a terminal, else on change.

    Returns:
        The last look.
    """
    if sys.stdout.isatty() and not json_output.wanted():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            while True:
                views, trouble = survey(runs)
                live.update(status_table(title, views, trouble, live.console.width), refresh=True)
                if until(views):
                    return views
                time.sleep(SECONDS_BETWEEN_LOOKS)
    shown = None
    while True:
        views, trouble = survey(runs)
        counts = Counter(v.state for v in views)
        if counts != shown:
            shown = counts
            say(", ".join(f"{n} {state}" for state, n in counts.items()) + (f" ({trouble})" if trouble else ""))
        if until(views):
            return views
        time.sleep(SECONDS_BETWEEN_LOOKS)


def none_active(views: list[RunView]) -> bool:
    """Whether every run has ended."""
    return not any(v.state in ACTIVE for v in views)
