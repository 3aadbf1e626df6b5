"""The report's section on costs: time by phase, memory, GPU-hours, and what was estimated before."""

from datetime import datetime
from statistics import median
from typing import Any

from cruijff_kit.analysis.report.document import Chart, Section, Table, several, shown
from cruijff_kit.analysis.report.figures import PALETTE, chart, figure, fitted
from cruijff_kit.analysis.report.load import Run, Runs, finite
from cruijff_kit.records.run_status import read_status

_PHASES = ("setup", "baseline", "train", "evaluate", "posthoc_evaluation")
_NAMED = 40  # bars that get their run's name
_GB = 1e9


def costs(runs: Runs) -> Section:
    """Time stacked by phase beside peak memory, a table, and estimates against facts."""
    section = Section("costs", "Time, memory and cost")
    timed = [r for r in runs.with_result if finite(r.result.seconds.get("total"))]
    if not timed:
        section.absent = "no run has ended yet"
        return section
    section.text.append(hours_in_words(runs))
    if earlier := sum(_earlier_seconds(r) for r in timed):
        section.text.append(
            f"Earlier starts of runs that were started again took another {few_digits(earlier / 3600)} hours."
        )
    section.blocks += [_chart(timed), _table(timed)]
    if estimates := _estimates(runs):
        section.blocks.append(estimates)
        section.text += _how_well(estimates)
    return section


def hours(runs: Runs) -> dict[str, float]:
    """GPU-hours and CPU-hours of this folder's own runs: seconds x processes / 3600, by what they computed on."""
    found = {"gpu_hours": 0.0, "cpu_hours": 0.0}
    for run in runs.with_result:
        if not (run.entry and run.entry.reused) and finite(run.result.seconds.get("total")):
            found["gpu_hours" if on_gpu(run) else "cpu_hours"] += _hours(run)
    return found


def hours_in_words(runs: Runs) -> str:
    """ "All runs together: 12.3 GPU-hours"."""
    words = {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours"}
    found = {words[k]: v for k, v in hours(runs).items() if v > 0}
    reused = sum(bool(r.entry and r.entry.reused) for r in runs.all)
    text = f"All runs together: {' and '.join(f'{few_digits(v)} {k}' for k, v in found.items()) or 'no time'}"
    return f"{text} (time x processes)" + (
        f"; {several(reused, 'run')} of an earlier sweep not counted." if reused else "."
    )


def few_digits(value: float) -> str:
    """Two digits of a small number; of a large one the whole part."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def on_gpu(run: Run) -> bool:
    """Whether it computed on a GPU; machine.device is "cpu" or the GPU's name."""
    return run.result.machine.get("device", "cpu") != "cpu"


def _hours(run: Run) -> float:
    return run.result.seconds["total"] / 3600 * (run.result.settings.get("processes") or 1)


def _earlier_seconds(run: Run) -> float:
    """What starts before the last one took, as status.json tells."""
    status = read_status(run.folder)
    spent = 0.0
    for start in status.history if status else []:
        try:
            ended, began = (datetime.fromisoformat(start[k]) for k in ("ended", "started"))
        except (KeyError, TypeError, ValueError):
            continue
        if start.get("state") != "done":  # of what was done the result has its time
            spent += max(0.0, (ended - began).total_seconds())
    return spent


def _phases(runs: list[Run]) -> list[str]:
    own = dict.fromkeys(p for r in runs for p in r.result.seconds if p != "total")
    return [*(p for p in _PHASES if p in own), *(p for p in own if p not in _PHASES)]


def _memory(run: Run) -> float | None:
    peak = run.result.training.get("peak_memory_bytes")
    return peak / _GB if peak else None


def _table(timed: list[Run]) -> Table:
    phases = _phases(timed)
    header = ["run", *(f"{p} (s)" for p in phases), "total (s)", "peak memory (GB)", "device", "processes", "restarts"]
    header += ["GPU-hours", "CPU-hours"]
    rows = []
    for r in timed:
        seconds = [r.result.seconds.get(p) for p in (*phases, "total")]
        spent = [_hours(r), None] if on_gpu(r) else [None, _hours(r)]
        machine = [r.result.machine.get("device"), r.result.settings.get("processes"), r.result.restarts]
        rows.append([r.label, *seconds, _memory(r), *machine, *spent])
    return Table("costs", "Time and memory of every run that has ended", header, rows)


def _chart(timed: list[Run]) -> Chart:
    phases = _phases(timed)
    ordered = timed if len(timed) <= _NAMED else sorted(timed, key=lambda r: -r.result.seconds["total"])
    rows: list[list[Any]] = [[r.label, *(r.result.seconds.get(p, 0.0) for p in phases), _memory(r)] for r in ordered]
    data = Table("costs_chart", "Time by phase, and peak memory", ["run", *phases, "peak memory (GB)"], rows)
    named, places = len(rows) <= _NAMED, range(len(rows))
    with figure(9.5, 1.3 + (0.22 * len(rows) if named else 5)) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        start = [0.0] * len(rows)
        for i, phase in enumerate(phases, 1):
            left.barh(
                places,
                [r[i] for r in rows],
                left=start,
                height=0.75 if named else 1.0,
                color=PALETTE[i - 1],
                label=phase,
            )
            start = [s + r[i] for s, r in zip(start, rows, strict=True)]
        right.barh(places, [r[-1] or 0 for r in rows], height=0.75 if named else 1.0, color=PALETTE[9])
        left.set(xlabel="seconds", ylim=(len(rows) - 0.4, -0.6))
        left.set_yticks(places if named else [], [fitted(r[0], 48) for r in rows] if named else [])
        right.set(xlabel="peak memory of training (GB)")
        for axes in (left, right):
            axes.grid(False, axis="y")
        drawn.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=len(phases))
        totals = [r.result.seconds["total"] for r in timed]
        alt = f"{data.caption} of {len(rows)} runs; totals from {shown(min(totals))} to {shown(max(totals))} seconds"
        return chart(drawn, data, f"{alt}." if named else f"{alt}, the longest first.")


def _estimates(runs: Runs) -> Table | None:
    rows: list[list[Any]] = []
    for r in runs.with_result:
        expected = r.entry.estimate if r.entry else {}
        total = r.result.seconds.get("total")
        if not expected or not finite(total):
            continue
        seconds, memory = expected.get("seconds"), expected.get("memory_bytes")
        facts = [total / seconds if finite(seconds) and seconds else None]
        memory, fact = (memory / _GB if finite(memory) else None), _memory(r)
        spent = _hours(r) if on_gpu(r) else None
        rows.append([r.label, seconds, total, *facts, memory, fact, fact / memory if fact and memory else None,
                     expected.get("gpu_hours"), spent, expected.get("basis")])  # fmt: skip
    header = ["run", "expected (s)", "took (s)", "took / expected", "expected memory (GB)", "peak memory (GB)",
              "peak / expected", "expected GPU-hours", "GPU-hours", "basis"]  # fmt: skip
    return Table("estimates", "What was expected before the runs, and what they took", header, rows) if rows else None


def _how_well(estimates: Table) -> list[str]:
    lines = []
    for what, column in (("time", 3), ("memory", 6)):
        ratios = [row[column] for row in estimates.rows if row[column] is not None]
        if ratios:
            lines.append(f"Runs took {shown(median(ratios))} times the expected {what} (median of {len(ratios)}).")
    return lines
