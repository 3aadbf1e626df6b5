"""The report's section on the best configurations: the objective that chose them, and their scores on the test split.

Values have intervals, and are compared with the base model, chance, and the best configuration.
"""

from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, NO_BETTER_THAN_CHANCE, SAME_ANSWER
from cruijff_kit.analysis.configurations import Configuration, is_finite
from cruijff_kit.analysis.estimates import Estimate
from cruijff_kit.analysis.report.document import Chart, Section, Table, format_count, format_value, join_words
from cruijff_kit.analysis.report.figures import GREY, PALETTE, make_chart, open_figure, shorten
from cruijff_kit.analysis.report.load import Family, Runs
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome, collect_outcomes
from cruijff_kit.analysis.report.wording import (
    SAMPLES,
    describe_detectable_differences,
    describe_selection,
    describe_test,
    format_interval,
    format_percent,
    name_population,
    name_units,
)

MAX_CONFIGURATIONS = 30  # configurations in a chart
MAX_TABLES = 8
_DIFFERENCE_COLUMNS = ("difference", "low", "high", "p", "p (Holm)")


def build_ranking(runs: Runs) -> Section:
    """Build the section: a chart and a table for the objective of each family, then for each score on the test split."""
    section = Section("best", "The best configurations")
    analysis = runs.analysis
    if not analysis.configurations:
        section.absent = "no run has finished"
        return section
    if reason := runs.analysis.no_best_reason:
        section.title = "Comparison of the configurations"
        section.text.append(reason)
    outcomes, num_families = collect_outcomes(runs), len(runs.families)
    section.text += [_describe_best(*pair) for pair in zip(runs.families[:4], outcomes, strict=False)]
    for number, outcome in enumerate(outcomes[:num_families][:4], 1):
        section.blocks += _make_blocks(outcome, "best_runs" if number == 1 else f"best_runs_{number}")
    if num_families > 4:
        section.text.append(f"{num_families - 4} more objectives are only in the table of all runs.")
    for number, outcome in enumerate(outcomes[num_families:][:MAX_TABLES], 1):
        section.blocks += _make_blocks(outcome, f"test_scores_{number}")
    section.text += _write_explanations(runs)
    return section


def _describe_best(family: Family, outcome: Outcome) -> str:
    r, e = family.ranking, outcome.estimate(outcome.configurations[0])
    value = format_value(e.value) + (f" {interval}" if (interval := format_interval(e)) else "")
    if len(r.configurations) == 1:
        return f"{family.name[0].upper()}{family.name[1:]}: {value}, {r.leader.name}."
    total = format_count(len(r.configurations), "configuration")
    text = f"Best {family.name} on the {r.split} split: {value}, {r.leader.name}, of {total}."
    if equals := [c.name for c in r.best[1:]]:
        names = join_words(equals[:8]) + (f" and {len(equals) - 8} more" if len(equals) > 8 else "")
        text += f" Configurations that cannot be distinguished from it: {names}."
    if r.is_optimistic:
        text += (
            f" It was {describe_selection(r)}. Comparisons of other configurations with it are biased in its favour."
        )
    return text + (f" {r.note[0].upper()}{r.note[1:]}." if r.note else "")


def _make_blocks(outcome: Outcome, name: str) -> list[Chart | Table]:
    estimates = [(c, outcome.estimate(c)) for c in outcome.configurations]
    return [_draw_chart(outcome, estimates, name), _make_table(outcome, estimates, name)]


def _best_configurations(outcome: Outcome) -> list[Configuration]:
    """Return the best configurations of each ranking that has several."""
    return [c for r in outcome.analysis.rankings for c in r.best if len(r.configurations) > 1]


def _make_table(outcome: Outcome, estimates: list[tuple[ConfiguredRuns, Estimate]], name: str) -> Table:
    header = [
        "configuration",
        "seeds",
        "value",
        "low",
        "high",
        "sd over seeds",
        "if calibrated",
        BASE_MODEL,
        "chance",
    ]
    parts = [*_DIFFERENCE_COLUMNS, outcome.units.removeprefix("test "), "test"]
    header += [f"versus {against}: {p}" for against in (BASE_MODEL, CHANCE, BEST) for p in parts]
    rows = []
    for c, e in estimates:
        row: list[Any] = [c.label, len(c.runs), e.value, e.low, e.high, e.seed_deviation, e.if_calibrated]
        row += [outcome.base_model(c), outcome.chance(c)]
        for against in (BASE_MODEL, CHANCE, BEST):
            row += _find_difference(outcome, c, against)
        rows.append(row)
    columns = [i for i in range(len(header)) if i < 3 or any(row[i] is not None for row in rows)]
    best = {i for i, (c, _) in enumerate(estimates) if c.configuration in _best_configurations(outcome)}
    table = [[row[i] for i in columns] for row in rows]
    return Table(name, f"Configurations by {outcome.name}", [header[i] for i in columns], table, best)


def _find_difference(outcome: Outcome, configured: ConfiguredRuns, against: str) -> list[Any]:
    for c in outcome.analysis.comparisons[configured.label]:
        if (c.against, c.metric_key) == (against, outcome.metric_key):
            values = [c.difference, c.low, c.high, c.p, c.p_holm]
            return [*(v if is_finite(v) else None for v in values), c.items, describe_test(c.method, outcome.units)]
    return [None] * (len(_DIFFERENCE_COLUMNS) + 2)


def _draw_chart(outcome: Outcome, estimates: list[tuple[ConfiguredRuns, Estimate]], name: str) -> Chart:
    top = estimates[:MAX_CONFIGURATIONS]
    rows: list[list[Any]] = [
        [c.label, e.value, e.low, e.high, outcome.base_model(c), outcome.chance(c)] for c, e in top
    ]
    subset = f"{len(top)} of {len(estimates)} configurations" if len(top) < len(estimates) else "every configuration"
    levels = join_words(
        [format_percent(level) for level in sorted({e.level for _, e in top if e.low is not None})], "or"
    )
    populations = join_words(sorted({name_population(e.over, outcome.units) for _, e in top} - {""}))
    caption = f"{outcome.name}, {subset}" + (f", with {levels} intervals over {populations}" if populations else "")
    data = Table(f"{name}_chart", caption, ["configuration", "value", "low", "high", BASE_MODEL, CHANCE], rows)
    best = {c.name for c in _best_configurations(outcome)}
    with open_figure(8, 1.1 + 0.24 * len(rows)) as fig:
        axes = fig.subplots()
        for position, (label, value, low, high, *_) in enumerate(rows):
            colour = PALETTE[1] if label in best else PALETTE[0]
            if low is not None:
                axes.plot(
                    [low, high], [position, position], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6
                )
            axes.plot([value], [position], "o", color=colour, markersize=5.5)
        _draw_references(axes, [c for c, _ in top], outcome)
        axes.set(yticks=range(len(rows)), yticklabels=[shorten(r[0], 60) for r in rows], xlabel=outcome.name)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        alt = (
            f"{caption}. First: {rows[0][0]} with {format_value(rows[0][1])}; last shown: {format_value(rows[-1][1])}."
        )
        return make_chart(fig, data, alt)


def _draw_references(axes: Any, configurations: list[ConfiguredRuns], outcome: Outcome) -> None:
    """Draw the base model, chance and the Bayes optimum: a line, or a mark for each configuration if values differ."""
    styles = {BASE_MODEL: (outcome.base_model, GREY, "--", "D"), CHANCE: (outcome.chance, PALETTE[4], "-.", "s")}
    for label, (read, colour, line, mark) in styles.items():
        values = [read(c) for c in configurations]
        if None not in values and len(set(values)) == 1:
            axes.axvline(values[0], color=colour, linestyle=line, linewidth=1.2, label=label)
        elif points := [(v, i) for i, v in enumerate(values) if v is not None]:
            axes.plot(*zip(*points, strict=True), mark, color=colour, markersize=4, linestyle="", label=label)
    bayes_optima = {outcome.bayes_optimum(c) for c in configurations}
    if len(bayes_optima) == 1 and None not in bayes_optima:
        axes.axvline(bayes_optima.pop(), color=PALETTE[2], linestyle=":", linewidth=1.5, label="Bayes optimum")
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside upper right", ncols=3)


def _write_explanations(runs: Runs) -> list[str]:
    analysis = runs.analysis
    results = [r for c in analysis.configurations for r in c.runs]
    text, units = [], name_units(results)
    unit_caveat = "" if units == SAMPLES else f"; the independent units are the {units} of the samples"
    if any(analysis.comparisons.values()):
        text.append(
            f"Differences are between answers to the same test samples, sample by sample{unit_caveat}. Since more "
            "comparisons yield more chance findings, p (Holm) is corrected for all tests of this section, and the "
            "intervals of the differences are simultaneous: all of them contain the true differences in 95% of studies "
            "like this. Chance is the best constant answer: the most frequent answer of the training split, or for "
            "numbers its mean or median."
        )
    if any(e.method == SAME_ANSWER for comparisons in analysis.comparisons.values() for e in comparisons):
        text.append(
            "A configuration that gives the same answer to every sample has no p: its score is no evidence of skill."
        )
    if any(e.method == NO_BETTER_THAN_CHANCE for comparisons in analysis.comparisons.values() for e in comparisons):
        text.append(
            "A configuration that is better than the base model, but not better than chance, has no p against the base "
            "model: it may have acquired only the format of the answers."
        )
    if any(len(c.runs) > 1 for c in analysis.configurations):
        text.append(
            f"Runs that differ only in their seed are one configuration. Its interval and its comparisons account for the "
            f"variation over {units} and over seeds (crossed random effects)."
        )
    if len(analysis.configurations) > 1:
        text += describe_detectable_differences(runs)
    return text + ([analysis.one_seed_notice] if analysis.one_seed_notice else [])
