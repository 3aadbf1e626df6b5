"""The report's section on costs: time by phase, memory and GPU-hours, and the accuracy of the estimates."""

from datetime import datetime
from statistics import median
from typing import Any

from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.report.document import Chart, Section, Table, format_count, format_value
from cruijff_kit.analysis.report.figures import PALETTE, make_chart, open_figure, shorten
from cruijff_kit.analysis.report.load import Runs, RunWithResult
from cruijff_kit.records.run_status import read_status

_PHASES = ("setup", "baseline", "train", "evaluate", "posthoc_evaluation")
_MAX_NAMED = 40  # bars that get their run's name
_GB = 1e9


def build_costs(runs: Runs) -> Section:
    """Build the section: a chart of time by phase and of peak memory, a table, and estimates against measurements."""
    section = Section("costs", "Time, memory and cost")
    timed_runs = [r for r in runs.runs_with_results if is_finite(r.result.seconds.get("total"))]
    if not timed_runs:
        section.absent = "no run has ended yet"
        return section
    section.text.append(describe_hours(runs))
    if earlier_seconds := sum(_earlier_seconds(r) for r in timed_runs):
        section.text.append(
            f"Earlier attempts of restarted runs took another {format_digits(earlier_seconds / 3600)} hours."
        )
    section.blocks += [_draw_chart(timed_runs), _make_table(timed_runs)]
    if estimates := _make_estimate_table(runs):
        section.blocks.append(estimates)
        section.text += _describe_estimate_accuracy(estimates)
    return section


def sum_hours(runs: Runs) -> dict[str, float]:
    """Sum GPU-hours and CPU-hours: seconds x processes / 3600. Runs that were reused from an earlier sweep do not count."""
    hours = {"gpu_hours": 0.0, "cpu_hours": 0.0}
    for run in runs.runs_with_results:
        if not (run.entry and run.entry.reused) and is_finite(run.result.seconds.get("total")):
            hours["gpu_hours" if is_on_gpu(run) else "cpu_hours"] += _device_hours(run)
    return hours


def describe_hours(runs: Runs) -> str:
    """Describe the total: "All runs together: 12.3 GPU-hours (time x processes)."."""
    words = {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours"}
    hours = {words[k]: v for k, v in sum_hours(runs).items() if v > 0}
    num_reused = sum(bool(r.entry and r.entry.reused) for r in runs.all_runs)
    text = f"All runs together: {' and '.join(f'{format_digits(v)} {k}' for k, v in hours.items()) or 'no time'}"
    return f"{text} (time x processes)" + (
        f", without {format_count(num_reused, 'run')} reused from an earlier sweep." if num_reused else "."
    )


def format_digits(value: float) -> str:
    """Format a number: two significant digits below 100, else the integer part."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def is_on_gpu(run: RunWithResult) -> bool:
    """Return whether a run computed on a GPU; machine.device is "cpu" or the GPU's name."""
    device: str = run.result.machine.get("device", "cpu")
    return device != "cpu"


def _device_hours(run: RunWithResult) -> float:
    return run.result.seconds["total"] / 3600 * (run.result.settings.get("processes") or 1)


def _earlier_seconds(run: RunWithResult) -> float:
    """Return the seconds of all attempts before the last one, from status.json."""
    status = read_status(run.folder)
    seconds = 0.0
    for attempt in status.history if status else []:
        try:
            end, start = (datetime.fromisoformat(attempt[k]) for k in ("ended", "started"))
        except (KeyError, TypeError, ValueError):
            continue
        if attempt.get("state") != "done":  # the result has the time of an attempt that is done
            seconds += max(0.0, (end - start).total_seconds())
    return seconds


def _list_phases(runs: list[RunWithResult]) -> list[str]:
    phases = dict.fromkeys(p for r in runs for p in r.result.seconds if p != "total")
    return [*(p for p in _PHASES if p in phases), *(p for p in phases if p not in _PHASES)]


def _peak_memory(run: RunWithResult) -> float | None:
    peak = run.result.training.get("peak_memory_bytes")
    return peak / _GB if peak else None


def _make_table(runs: list[RunWithResult]) -> Table:
    phases = _list_phases(runs)
    header = ["run", *(f"{p} (s)" for p in phases), "total (s)", "peak memory (GB)", "device", "processes", "restarts"]
    header += ["GPU-hours", "CPU-hours"]
    rows = []
    for r in runs:
        seconds = [r.result.seconds.get(p) for p in (*phases, "total")]
        hours = [_device_hours(r), None] if is_on_gpu(r) else [None, _device_hours(r)]
        machine = [r.result.machine.get("device"), r.result.settings.get("processes"), r.result.restarts]
        rows.append([r.label, *seconds, _peak_memory(r), *machine, *hours])
    return Table("costs", "Time and memory of every run that has ended", header, rows)


def _draw_chart(runs: list[RunWithResult]) -> Chart:
    phases = _list_phases(runs)
    sorted_runs = runs if len(runs) <= _MAX_NAMED else sorted(runs, key=lambda r: -r.result.seconds["total"])
    rows: list[list[Any]] = [
        [r.label, *(r.result.seconds.get(p, 0.0) for p in phases), _peak_memory(r)] for r in sorted_runs
    ]
    data = Table("costs_chart", "Time by phase, and peak memory", ["run", *phases, "peak memory (GB)"], rows)
    has_names, positions = len(rows) <= _MAX_NAMED, range(len(rows))
    with open_figure(9.5, 1.3 + (0.22 * len(rows) if has_names else 5)) as fig:
        time_axes, memory_axes = fig.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        starts = [0.0] * len(rows)
        for i, phase in enumerate(phases, 1):
            time_axes.barh(
                positions,
                [r[i] for r in rows],
                left=starts,
                height=0.75 if has_names else 1.0,
                color=PALETTE[i - 1],
                label=phase,
            )
            starts = [s + r[i] for s, r in zip(starts, rows, strict=True)]
        memory_axes.barh(positions, [r[-1] or 0 for r in rows], height=0.75 if has_names else 1.0, color=PALETTE[9])
        time_axes.set(xlabel="seconds", ylim=(len(rows) - 0.4, -0.6))
        time_axes.set_yticks(positions if has_names else [], [shorten(r[0], 48) for r in rows] if has_names else [])
        memory_axes.set(xlabel="peak memory of training (GB)")
        for axes in (time_axes, memory_axes):
            axes.grid(False, axis="y")
        fig.legend(*time_axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(phases))
        totals = [r.result.seconds["total"] for r in runs]
        span = f"{format_value(min(totals))} to {format_value(max(totals))} seconds"
        alt = f"{data.caption} of {len(rows)} runs; totals from {span}"
        return make_chart(fig, data, f"{alt}." if has_names else f"{alt}, the longest first.")


def _make_estimate_table(runs: Runs) -> Table | None:
    rows: list[list[Any]] = []
    for r in runs.runs_with_results:
        estimate = r.entry.estimate if r.entry else {}
        total = r.result.seconds.get("total")
        if not estimate or not is_finite(total):
            continue
        seconds, memory = estimate.get("seconds"), estimate.get("memory_bytes")
        ratios = [total / seconds if is_finite(seconds) and seconds else None]
        memory, peak = (memory / _GB if is_finite(memory) else None), _peak_memory(r)
        gpu_hours = _device_hours(r) if is_on_gpu(r) else None
        rows.append([r.label, seconds, total, *ratios, memory, peak, peak / memory if peak and memory else None,
                     estimate.get("gpu_hours"), gpu_hours, estimate.get("basis")])  # fmt: skip
    header = ["run", "expected (s)", "took (s)", "took / expected", "expected memory (GB)", "peak memory (GB)",
              "peak / expected", "expected GPU-hours", "GPU-hours", "basis"]  # fmt: skip
    return Table("estimates", "Estimated and measured time and memory", header, rows) if rows else None


def _describe_estimate_accuracy(estimates: Table) -> list[str]:
    lines = []
    for text, column in (("took {} times the estimated time", 3), ("used {} times the estimated memory", 6)):
        ratios = [row[column] for row in estimates.rows if row[column] is not None]
        if ratios:
            lines.append(f"The runs {text.format(format_value(median(ratios)))} (median of {len(ratios)}).")
    return lines
