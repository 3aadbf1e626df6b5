"""Charts of what the settings do: lines, heat maps, clouds of points. Called by effects."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from cruijff_kit.analysis.report.document import Chart, Table, listed, shown
from cruijff_kit.analysis.report.effect_sizes import Design, Effect, level_name
from cruijff_kit.analysis.report.figures import (
    PALETTE,
    chart,
    figure,
    fitted,
    logarithmic,
    scale,
    scale_axis,
    tick_values,
)
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome
from cruijff_kit.analysis.report.wording import over_in_words

_MOST_NUMBERS = 60  # cells of a heat map that has its numbers written in


def line(outcome: Outcome, effect: Effect, name: str) -> Chart:
    """The outcome over one setting, with intervals."""
    rows = [
        [level_name(value), sum(len(c.runs) for c in group), *_with_interval(outcome, group)]
        for value, group in effect.levels
    ]
    over = {row[-1] for row in rows} - {""}
    caption = f"{outcome.name} by {effect.name}" + (
        f", with 95% intervals {' and '.join(sorted(over))}" if over else ""
    )
    data = Table(name, caption, [effect.name, "runs", "mean", "low", "high", "interval"], rows)
    with figure(6.5, 3.6) as drawn:
        axes = drawn.subplots()
        xs = _positions(effect)
        means = [r[2] for r in rows]
        axes.plot(xs, means, "o-" if effect.numbers else "o", color=PALETTE[0])
        banded = [(x, r[3], r[4]) for x, r in zip(xs, rows, strict=True) if r[3] is not None]
        if effect.numbers and len(banded) == len(rows):
            places, lows, highs = zip(*banded, strict=True)
            axes.fill_between(places, lows, highs, color=PALETTE[0], alpha=0.2, linewidth=0)
        else:
            for x, low, high in banded:
                axes.plot([x, x], [low, high], color=PALETTE[0], linewidth=2, alpha=0.55)
        _place(axes, "x", effect, xs)
        axes.set(xlabel=effect.name, ylabel=outcome.name)
        alt = f"{caption}: " + "; ".join(f"{r[0]}: {shown(r[2])}" for r in rows[:12])
        return chart(drawn, data, alt)


def _positions(effect: Effect) -> list[float]:
    """Where each level stands on an axis."""
    if effect.numbers is None:
        return [*range(len(effect.levels))]
    return [effect.numbers[group[0]] for _, group in effect.levels]


def _with_interval(outcome: Outcome, group: list[ConfiguredRuns]) -> list[Any]:
    """Mean, low, high, and what the interval is over."""
    mean, ends = sum(c.value for c in group) / len(group), outcome.interval(group)
    over = {over_in_words(outcome.estimate(c).over, outcome.units) for c in group} - {""}
    return [mean, *(ends or (None, None)), f"over {listed(sorted(over))}" if over and ends else ""]


def heat_map(outcome: Outcome, design: Design, name: str) -> Chart:
    """Means over two settings: the second upwards, the first to the right."""
    across, up = design.effects[:2]
    cells: dict[tuple[Any, Any], list[ConfiguredRuns]] = {}
    for c in design.configurations:
        cells.setdefault((across.places[c], up.places[c]), []).append(c)
    xs, ys = ([value for value, _ in e.levels] for e in (across, up))
    rows = [
        [
            xs[x],
            ys[y],
            sum(c.value for c in own) / len(own),
            sum(len(c.runs) for c in own),
            *(outcome.interval(own) or (None, None)),
        ]
        for (x, y), own in sorted(cells.items())
    ]
    over = [e.name for e in design.effects[2:]] + (
        ["seeds"] if any(len(c.runs) > 1 for c in design.configurations) else []
    )
    caption = f"{outcome.name} by {across.name} and {up.name}" + (f", mean over {' and '.join(over)}" if over else "")
    data = Table(name, caption, [across.name, up.name, "mean", "runs", "low", "high"], rows)
    with figure(min(10, 3.2 + 0.75 * len(xs)), min(8, 1.6 + 0.45 * len(ys))) as drawn:
        axes = drawn.subplots()
        _cells(axes, rows, xs, ys, outcome)
        axes.set(xlabel=across.name, ylabel=up.name)
        best = (max if outcome.higher else min)(rows, key=lambda r: r[2])
        alt = f"Heat map: {caption}. {_best_cell(best, across, up)}"
        return chart(drawn, data, alt)


def _best_cell(best: list[Any], across: Effect, up: Effect) -> str:
    return f"Best: {shown(best[2])} at {across.name}={shown(best[0])}, {up.name}={shown(best[1])}."


def _cells(axes: Any, rows: list[list[Any]], xs: list[Any], ys: list[Any], outcome: Outcome) -> None:
    """Coloured cells, with their numbers where these fit; what no run has is left empty."""
    import matplotlib
    from matplotlib.colors import Normalize

    grid: list[list[float]] = [[float("nan")] * len(xs) for _ in ys]
    for x, y, mean, *_ in rows:
        grid[ys.index(y)][xs.index(x)] = mean
    means = [r[2] for r in rows]
    colours = matplotlib.colormaps["viridis" if outcome.higher else "viridis_r"]
    varies = max(means) > min(means)
    norm = Normalize(min(means), max(means) if varies else min(means) + 1)
    # drawn as shapes, not as a picture: sharp at any size, and cells without a run stay empty
    mesh = axes.pcolormesh(grid, cmap=colours, norm=norm, edgecolors="none")
    if len(xs) * len(ys) <= _MOST_NUMBERS:
        for x, y in itertools.product(range(len(xs)), range(len(ys))):
            if math.isnan(grid[y][x]):
                axes.text(x + 0.5, y + 0.5, "no run", ha="center", va="center", fontsize=7.5)
        for x, y, mean, *_ in rows:
            axes.text(xs.index(x) + 0.5, ys.index(y) + 0.5, f"{mean:.3g}", ha="center", va="center", fontsize=8,
                      color=_readable(colours(norm(mean))))  # fmt: skip
    if varies:
        axes.figure.colorbar(mesh, ax=axes, label=outcome.name)
    axes.set_xticks([i + 0.5 for i in range(len(xs))], [fitted(x, 24) for x in xs], rotation=0 if _narrow(xs) else 30,
                    ha="center" if _narrow(xs) else "right")  # fmt: skip
    axes.set_yticks([i + 0.5 for i in range(len(ys))], [fitted(y, 24) for y in ys])
    axes.grid(False)


def _narrow(values: list[Any]) -> bool:
    return max(len(fitted(v, 24)) for v in values) <= 8


def _readable(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def scatter(outcome: Outcome, design: Design, found: Sequence[Effect], name: str) -> Chart:
    """A point a configuration: what a search tried, the second setting as colour."""
    across, colour = found[0], found[1] if len(found) > 1 else None
    names = [e.name for e in found]
    rows = [[c.label, *(e.values[c] for e in found), c.value] for c in design.configurations]
    data = Table(name, f"{outcome.name} by {' and '.join(names)}, a point a run", ["run", *names, "value"], rows)
    with figure(7.5, 4) as drawn:
        axes = drawn.subplots()
        xs = [across.numbers[c] if across.numbers else across.places[c] for c in design.configurations]
        shades = [colour.numbers[c] for c in design.configurations] if colour and colour.numbers else []
        _points(axes, xs, rows, colour, shades)
        _place(axes, "x", across, xs)
        axes.set(xlabel=across.name, ylabel=outcome.name)
        best = (max if outcome.higher else min)(rows, key=lambda r: r[-1])
        return chart(drawn, data, f"{data.caption}. Best: {shown(best[-1])}, {best[0]}.")


def _points(axes: Any, xs: list[float], rows: list[list[Any]], colour: Effect | None, shades: list[float]) -> None:
    values = [row[-1] for row in rows]
    if colour is None:
        axes.plot(xs, values, "o", color=PALETTE[0], markersize=5, alpha=0.8)
    elif shades:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FuncFormatter

        norm = LogNorm(min(shades), max(shades)) if logarithmic(shades) else None
        bar = axes.figure.colorbar(
            axes.scatter(xs, values, c=shades, cmap=scale(), norm=norm, s=24), ax=axes, label=colour.name
        )
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.minorticks_off()
    else:
        for i, (value, _) in enumerate(colour.levels):
            own = [(x, row[-1]) for x, row in zip(xs, rows, strict=True) if row[2] == value]
            axes.plot(
                *zip(*own, strict=True), "o", color=PALETTE[i % len(PALETTE)], label=fitted(value, 24), markersize=5
            )
        axes.legend(title=colour.name)


def points(outcome: Outcome, design: Design, name: str) -> Chart:
    """Small plots side by side: each configuration at its value of each setting, without means."""
    rows = [[e.name, level_name(v), c.label, c.value] for e in design.effects for v, group in e.levels for c in group]
    caption = f"{outcome.name} by each setting, a point a configuration; not all effects can be separated"
    data = Table(name, caption, ["setting", "value", "run", "mean"], rows)

    def draw(axes: Any, e: Effect) -> None:
        xs = _positions(e)
        for x, (_, group) in zip(xs, e.levels, strict=True):
            axes.plot([x] * len(group), [c.value for c in group], "o", color=PALETTE[0], markersize=5, alpha=0.8)
        _place(axes, "x", e, xs)
        if e.numbers:
            axes.tick_params("x", labelrotation=30)

    best = (max if outcome.higher else min)(design.configurations, key=lambda c: c.value)
    return _panels(outcome, design.effects, draw, data, f"{caption}. Best: {shown(best.value)}, {best.label}.")


def marginals(outcome: Outcome, found: list[Effect], name: str) -> Chart:
    """Small plots side by side: the mean over all configurations of each value, its interval, and how far these reach."""
    rows = [
        [
            e.name,
            level_name(value),
            len(group),
            sum(s) / len(s),
            min(s),
            max(s),
            *(outcome.interval(group) or (None, None)),
        ]
        for e in found
        for value, group in e.levels
        for s in [[c.value for c in group]]
    ]
    caption = (
        f"{outcome.name} by the other settings: means over all configurations of each value, lowest to highest (thin)"
    )
    caption += ", 95% intervals of the means (thick)" if any(row[-1] is not None for row in rows) else ""
    header = ["setting", "value", "configurations", "mean", "lowest", "highest", "mean: low", "mean: high"]
    data = Table(name, caption, header, rows)

    def draw(axes: Any, e: Effect) -> None:
        own = [r for r in rows if r[0] == e.name]
        for place, row in enumerate(own):
            axes.plot([place, place], row[4:6], color=PALETTE[0], linewidth=1)
            if row[6] is not None:
                axes.plot([place, place], row[6:], color=PALETTE[0], linewidth=4, alpha=0.45, solid_capstyle="butt")
        axes.plot(range(len(own)), [r[3] for r in own], "o", color=PALETTE[0])
        _name_ticks(axes, [r[1] for r in own], 28)

    return _panels(
        outcome, found, draw, data, f"{caption}: " + "; ".join(f"{r[0]}={r[1]}: {shown(r[3])}" for r in rows[:16])
    )


def _panels(outcome: Outcome, found: list[Effect], draw: Callable[[Any, Effect], None], data: Table, alt: str) -> Chart:
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with figure(3.1 * columns + 0.4, 2.7 * lines) as drawn:
        panels = drawn.subplots(lines, columns, squeeze=False, sharey=True).flat
        for axes, e in zip(panels, found, strict=False):
            draw(axes, e)
            axes.set(title=fitted(e.name))
        for axes in list(panels):
            axes.set_visible(False)
        drawn.supylabel(fitted(outcome.name), fontsize=9)
        return chart(drawn, data, alt)


def _place(axes: Any, which: str, effect: Effect, values: list[float]) -> None:
    """Ticks of a setting: numbers at their place, names side by side."""
    if effect.numbers is None:
        _name_ticks(axes, [value for value, _ in effect.levels], 60)
        return
    scale_axis(axes, which, values)
    if not effect.drawn_from_range:
        tick_values(axes.xaxis, values)


def _name_ticks(axes: Any, values: list[Any], room: int) -> None:
    names = [fitted(level_name(value), 24) for value in values]
    wide = max(map(len, names)) * len(names) > room
    axes.set_xticks(range(len(names)), names, rotation=30 if wide else 0, ha="right" if wide else "center")
    axes.set_xlim(-0.5, len(names) - 0.5)
