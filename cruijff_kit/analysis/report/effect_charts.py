"""Charts of the effects of settings: lines, heat maps, scatter plots. Called by effects."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from cruijff_kit.analysis.report.document import Chart, Table, format_value, join_words
from cruijff_kit.analysis.report.effect_sizes import Design, Effect, format_level
from cruijff_kit.analysis.report.figures import (
    PALETTE,
    colour_scale,
    make_chart,
    needs_log_axis,
    open_figure,
    scale_axis,
    set_ticks,
    shorten,
)
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome
from cruijff_kit.analysis.report.wording import name_population

_MAX_NUMBERS = 60  # cells of a heat map up to which the numbers are written into them


def draw_line(outcome: Outcome, effect: Effect, name: str) -> Chart:
    """Draw the outcome over one setting, with intervals."""
    rows = [
        [format_level(value), sum(len(c.runs) for c in group), *_mean_and_interval(outcome, group)]
        for value, group in effect.levels
    ]
    populations = {row[-1] for row in rows} - {""}
    caption = f"{outcome.name} by {effect.name}" + (
        f", with 95% intervals {' and '.join(sorted(populations))}" if populations else ""
    )
    data = Table(name, caption, [effect.name, "runs", "mean", "low", "high", "interval"], rows)
    with open_figure(6.5, 3.6) as fig:
        axes = fig.subplots()
        xs = _axis_positions(effect)
        means = [r[2] for r in rows]
        axes.plot(xs, means, "o-" if effect.numbers else "o", color=PALETTE[0])
        intervals = [(x, r[3], r[4]) for x, r in zip(xs, rows, strict=True) if r[3] is not None]
        if effect.numbers and len(intervals) == len(rows):
            positions, lows, highs = zip(*intervals, strict=True)
            axes.fill_between(positions, lows, highs, color=PALETTE[0], alpha=0.2, linewidth=0)
        else:
            for x, low, high in intervals:
                axes.plot([x, x], [low, high], color=PALETTE[0], linewidth=2, alpha=0.55)
        _set_setting_ticks(axes, "x", effect, xs)
        axes.set(xlabel=effect.name, ylabel=outcome.name)
        alt = f"{caption}: " + "; ".join(f"{r[0]}: {format_value(r[2])}" for r in rows[:12])
        return make_chart(fig, data, alt)


def _axis_positions(effect: Effect) -> list[float]:
    """Return the position of each level on an axis."""
    if effect.numbers is None:
        return [*range(len(effect.levels))]
    return [effect.numbers[group[0]] for _, group in effect.levels]


def _mean_and_interval(outcome: Outcome, group: list[ConfiguredRuns]) -> list[Any]:
    """Return the mean, both ends of its interval, and the population of the interval."""
    mean, interval = sum(c.value for c in group) / len(group), outcome.interval(group)
    populations = {name_population(outcome.estimate(c).over, outcome.units) for c in group} - {""}
    population = f"over {join_words(sorted(populations))}" if populations and interval else ""
    return [mean, *(interval or (None, None)), population]


def draw_heat_map(outcome: Outcome, design: Design, name: str) -> Chart:
    """Draw means over two settings: the first on the x axis, the second on the y axis."""
    x_effect, y_effect = design.effects[:2]
    cells: dict[tuple[Any, Any], list[ConfiguredRuns]] = {}
    for c in design.configurations:
        cells.setdefault((x_effect.level_numbers[c], y_effect.level_numbers[c]), []).append(c)
    xs, ys = ([value for value, _ in e.levels] for e in (x_effect, y_effect))
    rows = [
        [
            xs[x],
            ys[y],
            sum(c.value for c in group) / len(group),
            sum(len(c.runs) for c in group),
            *(outcome.interval(group) or (None, None)),
        ]
        for (x, y), group in sorted(cells.items())
    ]
    averaged = [e.name for e in design.effects[2:]] + (
        ["seeds"] if any(len(c.runs) > 1 for c in design.configurations) else []
    )
    caption = f"{outcome.name} by {x_effect.name} and {y_effect.name}"
    caption += f", mean over {' and '.join(averaged)}" if averaged else ""
    data = Table(name, caption, [x_effect.name, y_effect.name, "mean", "runs", "low", "high"], rows)
    with open_figure(min(10, 3.2 + 0.75 * len(xs)), min(8, 1.6 + 0.45 * len(ys))) as fig:
        axes = fig.subplots()
        _draw_cells(axes, rows, xs, ys, outcome)
        axes.set(xlabel=x_effect.name, ylabel=y_effect.name)
        best = (max if outcome.is_higher_better else min)(rows, key=lambda r: r[2])
        place = f"{x_effect.name}={format_value(best[0])}, {y_effect.name}={format_value(best[1])}"
        return make_chart(fig, data, f"Heat map: {caption}. Best: {format_value(best[2])} at {place}.")


def _draw_cells(axes: Any, rows: list[list[Any]], xs: list[Any], ys: list[Any], outcome: Outcome) -> None:
    """Draw coloured cells, with their numbers if these fit; a cell without a run stays empty."""
    import matplotlib
    from matplotlib.colors import Normalize

    grid: list[list[float]] = [[float("nan")] * len(xs) for _ in ys]
    for x, y, mean, *_ in rows:
        grid[ys.index(y)][xs.index(x)] = mean
    means = [r[2] for r in rows]
    colours = matplotlib.colormaps["viridis" if outcome.is_higher_better else "viridis_r"]
    varies = max(means) > min(means)
    norm = Normalize(min(means), max(means) if varies else min(means) + 1)
    # shapes, not a picture: sharp at any size, and cells without a run stay empty
    mesh = axes.pcolormesh(grid, cmap=colours, norm=norm, edgecolors="none")
    if len(xs) * len(ys) <= _MAX_NUMBERS:
        for x, y in itertools.product(range(len(xs)), range(len(ys))):
            if math.isnan(grid[y][x]):
                axes.text(x + 0.5, y + 0.5, "no run", ha="center", va="center", fontsize=7.5)
        for x, y, mean, *_ in rows:
            axes.text(xs.index(x) + 0.5, ys.index(y) + 0.5, f"{mean:.3g}", ha="center", va="center", fontsize=8,
                      color=_choose_text_colour(colours(norm(mean))))  # fmt: skip
    if varies:
        axes.figure.colorbar(mesh, ax=axes, label=outcome.name)
    axes.set_xticks([i + 0.5 for i in range(len(xs))], [shorten(x, 24) for x in xs], rotation=0 if _are_narrow(xs) else 30,
                    ha="center" if _are_narrow(xs) else "right")  # fmt: skip
    axes.set_yticks([i + 0.5 for i in range(len(ys))], [shorten(y, 24) for y in ys])
    axes.grid(False)


def _are_narrow(values: list[Any]) -> bool:
    return max(len(shorten(v, 24)) for v in values) <= 8


def _choose_text_colour(colour: tuple[float, ...]) -> str:
    """Return black or white, whichever has more contrast with a colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def draw_scatter(outcome: Outcome, design: Design, effects: Sequence[Effect], name: str) -> Chart:
    """Draw a point for each configuration, with the second setting as colour, as for a search."""
    x_effect, colour_effect = effects[0], effects[1] if len(effects) > 1 else None
    names = [e.name for e in effects]
    rows = [[c.label, *(e.values[c] for e in effects), c.value] for c in design.configurations]
    data = Table(
        name, f"{outcome.name} by {' and '.join(names)}, one point per configuration", ["run", *names, "value"], rows
    )
    with open_figure(7.5, 4) as fig:
        axes = fig.subplots()
        xs = [x_effect.numbers[c] if x_effect.numbers else x_effect.level_numbers[c] for c in design.configurations]
        numbers = colour_effect.numbers if colour_effect else None
        shades = [numbers[c] for c in design.configurations] if numbers else []
        _draw_cloud(axes, xs, rows, colour_effect, shades)
        _set_setting_ticks(axes, "x", x_effect, xs)
        axes.set(xlabel=x_effect.name, ylabel=outcome.name)
        best = (max if outcome.is_higher_better else min)(rows, key=lambda r: r[-1])
        return make_chart(fig, data, f"{data.caption}. Best: {format_value(best[-1])}, {best[0]}.")


def _draw_cloud(
    axes: Any, xs: list[float], rows: list[list[Any]], colour_effect: Effect | None, shades: list[float]
) -> None:
    values = [row[-1] for row in rows]
    if colour_effect is None:
        axes.plot(xs, values, "o", color=PALETTE[0], markersize=5, alpha=0.8)
    elif shades:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FuncFormatter

        norm = LogNorm(min(shades), max(shades)) if needs_log_axis(shades) else None
        bar = axes.figure.colorbar(
            axes.scatter(xs, values, c=shades, cmap=colour_scale(), norm=norm, s=24), ax=axes, label=colour_effect.name
        )
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.minorticks_off()
    else:
        for i, (value, _) in enumerate(colour_effect.levels):
            points = [(x, row[-1]) for x, row in zip(xs, rows, strict=True) if row[2] == value]
            axes.plot(
                *zip(*points, strict=True), "o", color=PALETTE[i % len(PALETTE)], label=shorten(value, 24), markersize=5
            )
        axes.legend(title=colour_effect.name)


def draw_points(outcome: Outcome, design: Design, name: str) -> Chart:
    """Draw a small plot for each setting: one point per configuration, without means."""
    rows = [[e.name, format_level(v), c.label, c.value] for e in design.effects for v, group in e.levels for c in group]
    caption = f"{outcome.name} by each setting, one point per configuration; not all effects can be separated"
    data = Table(name, caption, ["setting", "value", "run", "mean"], rows)

    def draw(axes: Any, e: Effect) -> None:
        xs = _axis_positions(e)
        for x, (_, group) in zip(xs, e.levels, strict=True):
            axes.plot([x] * len(group), [c.value for c in group], "o", color=PALETTE[0], markersize=5, alpha=0.8)
        _set_setting_ticks(axes, "x", e, xs)
        if e.numbers:
            axes.tick_params("x", labelrotation=30)

    best = (max if outcome.is_higher_better else min)(design.configurations, key=lambda c: c.value)
    return _draw_panels(
        outcome, design.effects, draw, data, f"{caption}. Best: {format_value(best.value)}, {best.label}."
    )


def draw_marginals(outcome: Outcome, effects: list[Effect], name: str) -> Chart:
    """Draw a small plot for each setting: the mean, its interval and the range of the configurations of each value."""
    rows = [
        [
            e.name,
            format_level(value),
            len(group),
            sum(s) / len(s),
            min(s),
            max(s),
            *(outcome.interval(group) or (None, None)),
        ]
        for e in effects
        for value, group in e.levels
        for s in [[c.value for c in group]]
    ]
    caption = f"{outcome.name} by the other settings: mean and range (thin) of all configurations with each value"
    caption += ", 95% intervals of the means (thick)" if any(row[-1] is not None for row in rows) else ""
    header = ["setting", "value", "configurations", "mean", "lowest", "highest", "mean: low", "mean: high"]
    data = Table(name, caption, header, rows)

    def draw(axes: Any, e: Effect) -> None:
        effect_rows = [r for r in rows if r[0] == e.name]
        for position, row in enumerate(effect_rows):
            axes.plot([position, position], row[4:6], color=PALETTE[0], linewidth=1)
            if row[6] is not None:
                axes.plot(
                    [position, position], row[6:], color=PALETTE[0], linewidth=4, alpha=0.45, solid_capstyle="butt"
                )
        axes.plot(range(len(effect_rows)), [r[3] for r in effect_rows], "o", color=PALETTE[0])
        _name_ticks(axes, [r[1] for r in effect_rows], 28)

    alt = f"{caption}: " + "; ".join(f"{r[0]}={r[1]}: {format_value(r[3])}" for r in rows[:16])
    return _draw_panels(outcome, effects, draw, data, alt)


def _draw_panels(
    outcome: Outcome, effects: list[Effect], draw: Callable[[Any, Effect], None], data: Table, alt: str
) -> Chart:
    columns = min(3, len(effects))
    lines = -(-len(effects) // columns)
    with open_figure(3.1 * columns + 0.4, 2.7 * lines) as fig:
        panels = fig.subplots(lines, columns, squeeze=False, sharey=True).flat
        for axes, e in zip(panels, effects, strict=False):
            draw(axes, e)
            axes.set(title=shorten(e.name))
        for axes in list(panels):
            axes.set_visible(False)
        fig.supylabel(shorten(outcome.name), fontsize=9)
        return make_chart(fig, data, alt)


def _set_setting_ticks(axes: Any, axis_name: str, effect: Effect, values: list[float]) -> None:
    """Set the ticks of a setting: numbers at their values, names side by side."""
    if effect.numbers is None:
        _name_ticks(axes, [value for value, _ in effect.levels], 60)
        return
    scale_axis(axes, axis_name, values)
    if not effect.has_ranges:
        set_ticks(axes.xaxis, values)


def _name_ticks(axes: Any, values: list[Any], max_characters: int) -> None:
    names = [shorten(format_level(value), 24) for value in values]
    is_wide = max(map(len, names)) * len(names) > max_characters
    axes.set_xticks(range(len(names)), names, rotation=30 if is_wide else 0, ha="right" if is_wide else "center")
    axes.set_xlim(-0.5, len(names) - 0.5)
