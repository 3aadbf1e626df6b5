"""The report's section on the best runs: objectives with intervals, against the untrained model and the best run."""

import math
from typing import Any

from cruijff_kit.comparisons import BEST, UNTRAINED, Comparison
from cruijff_kit.replicates import replicates
from cruijff_kit.report.document import Chart, Section, Table, shown
from cruijff_kit.report.drawing import GREY, PALETTE, chart, figure, fitted
from cruijff_kit.report.runs import Family, Run, Runs, finite

MOST = 30  # runs in a chart
Z = 1.959964  # of a 95% interval
_ERRORS = ("accuracy", "mean")  # metrics whose standard error over items the results have


def ranking(runs: Runs) -> Section:
    """A chart and a table for each family of runs, and the means over seeds."""
    section = Section("best", "The best runs")
    if not runs.families:
        section.absent = "no run has finished with an objective"
        return section
    for number, family in enumerate(runs.families[:4], 1):
        name = "best_runs" if number == 1 else f"best_runs_{number}"
        section.text.append(_sentence(family))
        table = _table(family, name)
        section.blocks += [_chart(family, name), table]
    if len(runs.families) > 4:
        section.text.append(f"{len(runs.families) - 4} more objectives stand in the first table only.")
    if seeds := _seeds(runs):
        section.blocks.append(seeds)
    columns = {c for table in section.tables for c in table.columns}
    if "low" in columns:
        section.text.append(
            "Intervals are 95%: 1.96 standard errors over test items (Wilson's where all or none are right)."
        )
    if "versus untrained: p" in columns or "versus best: p" in columns:
        section.text.append(
            "Differences are item by item, over the items that both answered; p is corrected for the runs shown (Holm). "
            "The best run was chosen on these very items, so comparisons with it flatter it."
        )
    return section


def _sentence(family: Family) -> str:
    best = family.best
    ceiling = _ceiling(family, best)
    low, high = interval(family, best)
    about = f" (95% interval {shown(low)} to {shown(high)})" if low is not None else ""
    text = f"{family.name}: {shown(best.result.objective)}{about}, {best.label}"
    if len(family.runs) > 1:
        text = f"Best {text}, of {len(family.runs)} runs"
    text = text[0].upper() + text[1:]
    return f"{text}." + (f" The best that any model can expect is {shown(ceiling)}." if ceiling is not None else "")


def _ceiling(family: Family, run: Run) -> float | None:
    cell = run.last(family.source[0]) if family.source else None
    return cell.ceiling.get(family.source[2]) if cell else None


def interval(family: Family, run: Run, untrained: bool = False) -> tuple[float | None, float | None]:
    """The 95% interval over test items of a run's objective, or of the untrained model's; (None, None) without one."""
    cell = run.last(family.source[0], untrained) if family.source else None
    if cell is None or family.source[2] not in _ERRORS:
        return None, None
    values = cell.metrics.get(family.source[1], {})
    value, error = values.get(family.source[2]), values.get("stderr")
    if not finite(value) or not finite(error):
        return None, None
    if family.source[2] != "accuracy":
        return value - Z * error, value + Z * error
    scored = cell.samples - cell.unscored.get(family.source[1], 0)
    if error == 0 and value in (0, 1) and scored > 0:
        return wilson(value, scored)
    return max(0.0, value - Z * error), min(1.0, value + Z * error)


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (1927), which is not empty where all or none are right."""
    centre, denominator = share + Z * Z / (2 * number), 1 + Z * Z / number
    reach = Z * math.sqrt(share * (1 - share) / number + Z * Z / (4 * number * number))
    return max(0.0, (centre - reach) / denominator), min(1.0, (centre + reach) / denominator)


def untrained_value(family: Family, run: Run) -> float | None:
    """The objective of the untrained model on a run's test items."""
    cell = run.last(family.source[0], True) if family.source else None
    value = cell.metrics.get(family.source[1], {}).get(family.source[2]) if cell else None
    return value if finite(value) else None


def _table(family: Family, name: str) -> Table:
    header = ["run", "value", "low", "high", "untrained"]
    parts = ("difference", "low", "high", "p", "p (Holm)", "items")
    header += [f"versus {against}: {p}" for against in (UNTRAINED, BEST) for p in parts]
    rows = []
    for run in family.ranked:
        found = family.comparisons[run]
        row: list[Any] = [run.label, run.result.objective, *interval(family, run), untrained_value(family, run)]
        rows.append([*row, *_difference(found, UNTRAINED, family), *_difference(found, BEST, family)])
    kept = [i for i in range(len(header)) if i < 2 or any(row[i] is not None for row in rows)]
    caption = f"Runs by {family.name}, the best first"
    return Table(name, caption, [header[i] for i in kept], [[row[i] for i in kept] for row in rows], {0})


def _difference(found: list[Comparison], against: str, family: Family) -> list[Any]:
    wanted = (against, *family.source[:2]) if family.source else None
    for c in found:
        if (c.against, c.task, c.scorer) == wanted:
            return [c.difference, c.low, c.high, c.p, c.p_holm, c.items]
    return [None] * 6


def _chart(family: Family, name: str) -> Chart:
    top = family.ranked[:MOST]
    rows = [[r.label, r.result.objective, *interval(family, r), untrained_value(family, r)] for r in top]
    what = f"the best {len(top)} of {len(family.ranked)} runs" if len(top) < len(family.ranked) else "every run"
    caption = f"{family.name}, {what}" + (", with 95% intervals over test items" if rows[0][2] is not None else "")
    data = Table(f"{name}_chart", caption, ["run", "value", "low", "high", "untrained"], rows)
    with figure(8, 1.1 + 0.24 * len(rows)) as drawn:
        axes = drawn.subplots()
        for place, (_, value, low, high, _) in enumerate(rows):
            colour = PALETTE[1] if place == 0 and len(rows) > 1 else PALETTE[0]
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
            axes.plot([value], [place], "o", color=colour, markersize=5.5)
        _mark_known(axes, family, top)
        axes.set(yticks=range(len(rows)), yticklabels=[fitted(r[0], 60) for r in rows], xlabel=family.name)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        alt = f"{caption}. Best: {rows[0][0]} with {shown(rows[0][1])}; last shown: {shown(rows[-1][1])}."
        return chart(drawn, data, alt)


def _mark_known(axes: Any, family: Family, top: list[Run]) -> None:
    """The untrained model (a diamond a run, where it differs a line would say nothing) and the known best."""
    before = [untrained_value(family, r) for r in top]
    if None not in before and len(set(before)) == 1:
        axes.axvline(before[0], color=GREY, linestyle="--", linewidth=1.2, label="untrained")
    elif any(v is not None for v in before):
        known = [(v, i) for i, v in enumerate(before) if v is not None]
        axes.plot(*zip(*known, strict=True), "D", color=GREY, markersize=4, linestyle="", label="untrained")
    ceilings = {_ceiling(family, r) for r in top}
    if len(ceilings) == 1 and None not in ceilings:
        axes.axvline(ceilings.pop(), color=PALETTE[2], linestyle=":", linewidth=1.5, label="best that can be expected")
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside upper right", ncols=2)


def _seeds(runs: Runs) -> Table | None:
    """Means over seeds of each objective, and of the losses."""
    wanted = {"loss", "validation_loss", *("/".join(f.source) for f in runs.families if f.source)}
    rows = [
        [g.name, ", ".join(map(str, g.seeds)), metric, s.runs, s.mean, s.low, s.high, s.item_error]
        for g in replicates([r.result for r in runs.with_result])
        for metric, s in g.metrics.items()
        if metric in wanted
    ]
    header = ["configuration", "seeds", "metric", "runs", "mean", "low", "high", "standard error over items"]
    caption = "Means over seeds, with 95% intervals over seeds (Student's t)"
    return Table("seeds", caption, header, rows) if rows else None
