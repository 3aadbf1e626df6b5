"""The report's section on losses: every run's training and validation loss, update by update."""

import json
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.report.document import Section, Table, shown
from cruijff_kit.analysis.report.effect_sizes import find_effects
from cruijff_kit.analysis.report.figures import (
    GREY,
    INK,
    PALETTE,
    chart,
    figure,
    fitted,
    legend_below,
    logarithmic,
    scale,
    scale_axis,
)
from cruijff_kit.analysis.report.load import Run, Runs, finite
from cruijff_kit.analysis.report.outcomes import outcomes_of
from cruijff_kit.records.run_folder import RunFolder

Curve = list[tuple[float, float]]
"""(step, loss) in order."""
MOST_POINTS = 250  # of a curve; longer ones are means over as many stretches
_FEW = 8  # runs that get a colour and a name each
_WHAT = {"loss": "training loss", "validation_loss": "validation loss"}


def curves(runs: Runs) -> Section:
    """One figure: training and, where it was measured, validation loss."""
    section = Section("losses", "Losses")
    found = {r: {k: read_curve(RunFolder(r.folder).metrics, k) for k in _WHAT} for r in runs.all}
    found = {r: c for r, c in found.items() if any(c.values())}
    kinds = [k for k in _WHAT if any(c[k] for c in found.values())]
    if not kinds:
        section.absent = "no run has written a loss yet"
        return section
    drawn = {r: {k: thinned(c[k]) for k in kinds} for r, c in found.items()}
    rows = [[r.label, _WHAT[k], step, loss] for r, c in drawn.items() for k in kinds for step, loss in c[k]]
    data = Table("losses", "Loss per labelled token of every run", ["run", "kind", "step", "loss"], rows)
    section.blocks.append(_draw(runs, drawn, kinds, data))
    if any(len(c[k]) > MOST_POINTS for c in found.values() for k in kinds):
        section.text.append(f"Of long runs the curves are means over {MOST_POINTS} stretches of equal length.")
    return section


def read_curve(path: Path, key: str) -> Curve:
    """(step, value) of metrics.jsonl; of a step that a resumed run repeated the last. What cannot be read is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[float, float] = {}
    for line in lines:
        if f'"{key}"' not in line:
            continue
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and finite(row.get(key)) and finite(row.get("step")):
            found[row["step"]] = row[key]
    return sorted(found.items())


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """A long curve as means over stretches."""
    if len(curve) <= most:
        return curve
    edges = [round(i * len(curve) / most) for i in range(most + 1)]
    parts = [curve[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in parts]


def _draw(runs: Runs, drawn: dict[Run, dict[str, Curve]], kinds: list[str], data: Table) -> Any:
    best = runs.families[0].best if runs.families and len(drawn) > 1 else None
    colours, key = _colours(runs, [*drawn])
    few = len(drawn) <= _FEW
    from matplotlib.ticker import MaxNLocator

    with figure(9.5 if len(kinds) > 1 else 7, 3.6 + (0.17 * len(drawn) if few else 0)) as page:
        panels = page.subplots(1, len(kinds), squeeze=False, sharex=True)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for run in sorted(drawn, key=lambda r: r is best):
                _line(axes, run, drawn[run][kind], INK if run is best and not few else colours[run], run is best, few)
            losses = [v for c in drawn.values() for _, v in c[kind]]
            scale_axis(axes, "y", losses, ratio=20)
            axes.set(title=_WHAT[kind], xlabel="update")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _explain(page, panels, drawn, best, key, runs)
        ends = [c[kinds[-1]][-1][1] for c in drawn.values() if c[kinds[-1]]]
        alt = f"{' and '.join(_WHAT[k] for k in kinds)} of {len(drawn)} runs over updates; "
        return chart(page, data, alt + f"the last values lie between {shown(min(ends))} and {shown(max(ends))}.")


def _line(axes: Any, run: Run, curve: Curve, colour: Any, best: bool, few: bool) -> None:
    if not curve:
        return
    label = fitted(run.label, 60) if few else None
    width, alpha = (2.4, 1.0) if best else (1.4, 0.9) if few else (0.8, 0.55)
    marker = "o" if len(curve) < 12 and (few or len(curve) == 1) else ""
    axes.plot(*zip(*curve, strict=True), color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=4,
              label=label)  # fmt: skip


def _colours(runs: Runs, shown_runs: list[Run]) -> tuple[dict[Run, Any], str | None]:
    """Run -> colour: each its own where they are few, else by the setting that matters most, else grey."""
    if len(shown_runs) <= _FEW:
        return {r: PALETTE[i] for i, r in enumerate(shown_runs)}, None
    outcomes = outcomes_of(runs)
    found = find_effects(outcomes[0]) if outcomes else []
    key = found[0].keys[0] if found else None
    values = list(dict.fromkeys(repr(r.value(key)) for r in shown_runs)) if key else []
    numbers = [r.value(key) for r in shown_runs if finite(r.value(key))] if key else []
    if key and len(numbers) == len(shown_runs) and len(values) > 2:
        place = norm(numbers)
        return {r: scale()(place(r.value(key))) for r in shown_runs}, key
    if key and len(values) <= len(PALETTE):
        return {r: PALETTE[values.index(repr(r.value(key)))] for r in shown_runs}, key
    return dict.fromkeys(shown_runs, GREY), None


def norm(values: list[float]) -> Any:
    """Number -> 0..1 on the colour scale, logarithmic where the numbers spread far."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if logarithmic(values) else Normalize)(min(values), max(values))


def _explain(page: Any, panels: Any, drawn: dict[Any, Any], best: Run | None, key: str | None, runs: Runs) -> None:
    """The legend: runs, values of the setting, or a bar of colours; and which the best run is."""
    if len(drawn) <= _FEW:
        if len(drawn) > 1:
            legend_below(panels[0], len(drawn), max(len(fitted(r.label, 60)) for r in drawn))
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    handles = []
    numbers = [r.value(key) for r in drawn if finite(r.value(key))] if key else []
    values = {repr(r.value(key)): r.value(key) for r in drawn} if key else {}
    if key and len(numbers) == len(drawn) and len(values) > 2:
        bar = page.colorbar(ScalarMappable(norm(numbers), scale()), ax=list(panels), label=key, shrink=0.9)
        from matplotlib.ticker import FuncFormatter

        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if len(values) <= _FEW:
            bar.set_ticks(sorted(values.values()))
        bar.ax.minorticks_off()
    elif key:
        handles = [
            Line2D([], [], color=PALETTE[i], label=f"{key} = {fitted(v)}") for i, v in enumerate(values.values())
        ]
    else:
        handles = [Line2D([], [], color=GREY, label="runs")]
    if best is not None:
        handles.append(Line2D([], [], linewidth=2.4, color=INK, label=f"best, {fitted(best.label, 60)}"))
    page.legend(handles=handles, loc="outside lower left", ncols=3)
