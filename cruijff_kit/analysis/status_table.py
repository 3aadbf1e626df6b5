"""The state of runs as a table, once or until they end."""

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


_WIDE = 130  # columns in which the reasons have room


def make_status_table(title: str, infos: list[RunInfo], trouble: str | None, width: int) -> "RenderableType":
    """The rows as people see them, and how many runs are in which state.

    Args:
        width: of the terminal; in a narrow one reasons stand below the table, and columns without content are left out.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    narrow = width < _WIDE
    rows = [_cells(v) for v in infos]
    heads = [h for h in rows[0] if not narrow or (h != "reason" and any(row[h] for row in rows))]
    table = Table(title=title, title_justify="left")
    for head in heads:
        justify: Literal["left", "right"] = "right" if head in ("step", "loss", "elapsed", "left") else "left"
        table.add_column(head, overflow="fold", justify=justify, no_wrap=head not in ("run", "reason"))
    for info, row in zip(infos, rows, strict=True):
        table.add_row(*(Text(row[h]) for h in heads), style=_COLOURS.get(info.state))
    counts = Counter(v.state for v in infos)
    lines = [Text(f"{row['run']}: {row['reason']}") for row in rows if narrow and row["reason"]]
    lines.append(
        Text(f"{len(infos)} run{'s' * (len(infos) != 1)}: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    )
    if trouble:
        lines.append(Text(f"SLURM does not answer; the runs last reported: {trouble}", style="yellow"))
    return Group(table, *lines)


def _cells(v: RunInfo) -> dict[str, str]:
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
    return "" if seconds is None else format_clock(int(seconds))


def _reason(info: RunInfo) -> str:
    restarts = f"restarted {info.restarts} time{'s' * (info.restarts > 1)}" if info.restarts else None
    changes = ", ".join(f"{k}={v}" for k, v in info.changes.items()) or None
    return "; ".join(filter(None, [info.reason, restarts, changes, *info.notes]))


def watch(title: str, runs: list[RunRef], until: Callable[[list[RunInfo]], bool]) -> list[RunInfo]:
    """Show the table every few seconds until a condition holds: in place in a terminal, else when the counts change.

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
    shown = None
    while True:
        infos, trouble = collect_states(runs)
        counts = Counter(v.state for v in infos)
        if counts != shown:
            shown = counts
            say(", ".join(f"{n} {state}" for state, n in counts.items()) + (f" ({trouble})" if trouble else ""))
        if until(infos):
            return infos
        time.sleep(POLL_SECONDS)


def have_ended(infos: list[RunInfo]) -> bool:
    """Whether every run has ended."""
    return not any(v.state in ACTIVE for v in infos)
