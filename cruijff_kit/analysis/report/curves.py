"""The report's section on losses: the training and validation loss of every run over the updates."""

import json
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.report.document import Section, Table, format_value
from cruijff_kit.analysis.report.effect_sizes import find_effects
from cruijff_kit.analysis.report.figures import (
    GREY,
    INK,
    PALETTE,
    add_legend_below,
    colour_scale,
    make_chart,
    needs_log_axis,
    open_figure,
    scale_axis,
    shorten,
)
from cruijff_kit.analysis.report.load import ReportRun, Runs
from cruijff_kit.analysis.report.outcomes import collect_outcomes
from cruijff_kit.records.run_folder import RunFolder

Curve = list[tuple[float, float]]
"""(step, loss) in order."""
MAX_POINTS = 250  # of a curve; a longer one is averaged over as many stretches
_FEW = 8  # up to this number each run has its own colour and name
_KINDS = {"loss": "training loss", "validation_loss": "validation loss"}


def build_curves(runs: Runs) -> Section:
    """Build the section: a figure of the training loss and, where it was measured, the validation loss."""
    section = Section("losses", "Losses")
    curves_by_run = {r: {k: read_curve(RunFolder(r.folder).metrics, k) for k in _KINDS} for r in runs.all_runs}
    curves_by_run = {r: c for r, c in curves_by_run.items() if any(c.values())}
    kinds = [k for k in _KINDS if any(c[k] for c in curves_by_run.values())]
    if not kinds:
        section.absent = "no run has written a loss yet"
        return section
    thin_curves = {r: {k: downsample(c[k]) for k in kinds} for r, c in curves_by_run.items()}
    rows = [[r.label, _KINDS[k], step, loss] for r, c in thin_curves.items() for k in kinds for step, loss in c[k]]
    data = Table("losses", "Loss per labelled token of every run", ["run", "kind", "step", "loss"], rows)
    section.blocks.append(_draw_curves(runs, thin_curves, kinds, data))
    if any(len(c[k]) > MAX_POINTS for c in curves_by_run.values() for k in kinds):
        section.text.append(f"Curves of long runs show means over {MAX_POINTS} stretches of equal length.")
    return section


def read_curve(path: Path, key: str) -> Curve:
    """Read (step, value) from metrics.jsonl, the last value of each step (resumed runs repeat some); skip broken lines."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    value_by_step: dict[float, float] = {}
    for line in lines:
        if f'"{key}"' not in line:
            continue
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_finite(row.get(key)) and is_finite(row.get("step")):
            value_by_step[row["step"]] = row[key]
    return sorted(value_by_step.items())


def downsample(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """Average a curve over stretches if it has more than `max_points` points."""
    if len(curve) <= max_points:
        return curve
    edges = [round(i * len(curve) / max_points) for i in range(max_points + 1)]
    stretches = [curve[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in stretches]


def _draw_curves(runs: Runs, curves: dict[ReportRun, dict[str, Curve]], kinds: list[str], data: Table) -> Any:
    best_run = runs.families[0].best_run if runs.families and len(curves) > 1 else None
    colours, key = _choose_colours(runs, [*curves])
    has_few = len(curves) <= _FEW
    from matplotlib.ticker import MaxNLocator

    with open_figure(9.5 if len(kinds) > 1 else 7, 3.6 + (0.17 * len(curves) if has_few else 0)) as fig:
        panels = fig.subplots(1, len(kinds), squeeze=False, sharex=True)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for run in sorted(curves, key=lambda r: r is best_run):
                colour = INK if run is best_run and not has_few else colours[run]
                _draw_line(axes, run, curves[run][kind], colour, run is best_run, has_few)
            losses = [v for c in curves.values() for _, v in c[kind]]
            scale_axis(axes, "y", losses, ratio=20)
            axes.set(title=_KINDS[kind], xlabel="update")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _draw_legend(fig, panels, curves, best_run, key)
        last_values = [c[kinds[-1]][-1][1] for c in curves.values() if c[kinds[-1]]]
        alt = (
            f"{' and '.join(_KINDS[k] for k in kinds)} of {len(curves)} runs over updates; the last values are between "
        )
        alt += f"{format_value(min(last_values))} and {format_value(max(last_values))}."
        return make_chart(fig, data, alt)


def _draw_line(axes: Any, run: ReportRun, curve: Curve, colour: Any, is_best: bool, has_few: bool) -> None:
    if not curve:
        return
    label = shorten(run.label, 60) if has_few else None
    width, alpha = (2.4, 1.0) if is_best else (1.4, 0.9) if has_few else (0.8, 0.55)
    marker = "o" if len(curve) < 12 and (has_few or len(curve) == 1) else ""
    axes.plot(*zip(*curve, strict=True), color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=4,
              label=label)  # fmt: skip


def _choose_colours(runs: Runs, drawn_runs: list[ReportRun]) -> tuple[dict[ReportRun, Any], str | None]:
    """Choose a colour for each run: a different one for few runs, else by the setting with the largest effect, else grey.

    Returns:
        Run -> colour, and the setting.
    """
    if len(drawn_runs) <= _FEW:
        return {r: PALETTE[i] for i, r in enumerate(drawn_runs)}, None
    outcomes = collect_outcomes(runs)
    effects = find_effects(outcomes[0]) if outcomes else []
    key = effects[0].keys[0] if effects else None
    values = list(dict.fromkeys(repr(r.value(key)) for r in drawn_runs)) if key else []
    numbers = [r.value(key) for r in drawn_runs if is_finite(r.value(key))] if key else []
    if key and len(numbers) == len(drawn_runs) and len(values) > 2:
        norm = make_norm(numbers)
        return {r: colour_scale()(norm(r.value(key))) for r in drawn_runs}, key
    if key and len(values) <= len(PALETTE):
        return {r: PALETTE[values.index(repr(r.value(key)))] for r in drawn_runs}, key
    return dict.fromkeys(drawn_runs, GREY), None


def make_norm(values: list[float]) -> Any:
    """Return a function from numbers to 0..1 on the colour scale, logarithmic if the values need it."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if needs_log_axis(values) else Normalize)(min(values), max(values))


def _draw_legend(fig: Any, panels: Any, curves: dict[Any, Any], best_run: ReportRun | None, key: str | None) -> None:
    """Draw the legend: runs, values of the setting, or a bar of colours; and the best run."""
    if len(curves) <= _FEW:
        if len(curves) > 1:
            add_legend_below(panels[0], len(curves), max(len(shorten(r.label, 60)) for r in curves))
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    handles = []
    numbers = [r.value(key) for r in curves if is_finite(r.value(key))] if key else []
    values = {repr(r.value(key)): r.value(key) for r in curves} if key else {}
    if key and len(numbers) == len(curves) and len(values) > 2:
        bar = fig.colorbar(ScalarMappable(make_norm(numbers), colour_scale()), ax=list(panels), label=key, shrink=0.9)
        from matplotlib.ticker import FuncFormatter

        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if len(values) <= _FEW:
            bar.set_ticks(sorted(values.values()))
        bar.ax.minorticks_off()
    elif key:
        handles = [
            Line2D([], [], color=PALETTE[i], label=f"{key} = {shorten(v)}") for i, v in enumerate(values.values())
        ]
    else:
        handles = [Line2D([], [], color=GREY, label="runs")]
    if best_run is not None:
        handles.append(Line2D([], [], linewidth=2.4, color=INK, label=f"best, {shorten(best_run.label, 60)}"))
    fig.legend(handles=handles, loc="outside lower left", ncols=3)
